"""Weighted means, SLERP and arithmetic with task vectors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.methods.merging import apply, linear, slerp, task_arithmetic, task_vector

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return x / x.norm()


def model(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_linear_is_the_weighted_mean():
    assert linear([torch.tensor([1.0]), torch.tensor([5.0])], [3.0, 1.0]).item() == 2.0


def test_linear_without_normalisation_is_the_weighted_sum():
    assert linear([torch.tensor([1.0]), torch.tensor([5.0])], [3.0, 1.0], normalize=False).item() == 8.0


def test_weights_that_add_up_to_zero_cannot_be_normalised():
    with pytest.raises(ValueError, match="add up to 0"):
        linear([torch.ones(2), torch.ones(2)], [1.0, -1.0])


@pytest.mark.parametrize("merge", [linear, task_arithmetic])
def test_a_missing_weight_is_refused(merge):
    with pytest.raises(ValueError, match="1 weights for 2 tensors"):
        merge([torch.ones(2), torch.ones(2)], [1.0])


@pytest.mark.parametrize("merge", [linear, task_arithmetic])
def test_no_model_at_all_is_refused(merge):
    with pytest.raises(ValueError, match="at least one"):
        merge([])


def test_tensors_of_unequal_shapes_are_refused_even_where_they_would_broadcast():
    with pytest.raises(ValueError, match=r"\(2,\), \(1,\)"):
        linear([torch.ones(2), torch.ones(1)])
    with pytest.raises(ValueError, match=r"\(2,\), \(1,\)"):
        task_vector(torch.ones(2), torch.ones(1))
    with pytest.raises(ValueError, match=r"\(2,\), \(1,\)"):
        apply(torch.ones(2), torch.ones(1))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from(FLOATS),
    models=st.integers(1, 4),
    t=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_model_merged_with_itself_stays_what_it_is(shape, dtype, models, t, seed):
    x = model(*shape, seed=seed).to(dtype)
    rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(linear([x] * models), x, **rounding)
    torch.testing.assert_close(slerp(x, x, t), x, **rounding)
    same = task_arithmetic([task_vector(x, torch.zeros_like(x))] * models, [1 / models] * models)
    torch.testing.assert_close(apply(torch.zeros_like(x), same), x, **rounding)


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(0, 9), max_size=3), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))
def test_at_its_ends_slerp_is_its_ends(shape, dtype, seed):
    a, b = model(*shape, seed=seed).to(dtype), model(*shape, seed=seed + 100).to(dtype)
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(slerp(a, b, 0.0), a, **rounding)
    torch.testing.assert_close(slerp(a, b, 1.0), b, **rounding)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 300), t=st.floats(0, 1), norm=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_slerp_keeps_the_norm_between_equal_norms(n, t, norm, seed):
    a, b = unit(n, seed=seed).double() * norm, unit(n, seed=seed + 100).double() * norm
    if abs((a @ b).item()) / norm**2 < 0.9995:
        assert slerp(a, b, t).norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_unit_vectors_is_a_rotation_in_their_plane(t):
    """An independent oracle: the matrix exponential of t times the angle times the plane's generator."""
    a, b = unit(7, seed=1).double(), unit(7, seed=2).double()
    angle = torch.arccos(a @ b)
    u = b - (a @ b) * a
    u = u / u.norm()
    rotation = torch.linalg.matrix_exp(t * angle * (torch.outer(u, a) - torch.outer(a, u)))
    assert torch.allclose(slerp(a.float(), b.float(), t), (rotation @ a).float(), atol=1e-6)


def test_slerp_keeps_the_norm_that_lerp_loses_between_orthogonal_vectors():
    a, b = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    assert slerp(a, b, 0.5).norm().item() == pytest.approx(1)
    assert ((a + b) / 2).norm().item() == pytest.approx(math.sqrt(0.5))


def test_slerp_of_two_fine_tunes_of_one_base_is_lerp():
    base = torch.randn(40, 30)
    a, b = base + 0.01 * torch.randn(40, 30), base + 0.01 * torch.randn(40, 30)
    assert torch.equal(slerp(a, b, 0.5), 0.5 * a + 0.5 * b)


@pytest.mark.parametrize("cosine", [0.99951, -0.99951])
def test_slerp_of_nearly_parallel_and_nearly_opposite_vectors_is_lerp(cosine):
    a, b = torch.tensor([1.0, 0]), torch.tensor([cosine, math.sqrt(1 - cosine**2)])
    assert torch.allclose(slerp(a, b, 0.3), 0.7 * a + 0.3 * b, atol=1e-7)


@pytest.mark.parametrize("zero", [0, 1])
def test_a_zero_tensor_such_as_a_fresh_lora_b_gives_no_nan(zero):
    pair = [torch.ones(3, 2), torch.ones(3, 2)]
    pair[zero] = torch.zeros(3, 2)
    assert torch.equal(slerp(*pair, 0.25), 0.75 * pair[0] + 0.25 * pair[1])


def test_slerp_keeps_the_dtype_and_refuses_unequal_shapes():
    assert slerp(unit(4, 3).bfloat16(), unit(4, 3, seed=5).bfloat16(), 0.3).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        slerp(torch.ones(2), torch.ones(1), 0.5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_subtracting_what_was_added_returns_the_base(dtype):
    """To the last bit if the sum in between is kept in fp64, else to the rounding of its dtype."""
    base = model(30, 20).to(dtype)
    tau = task_vector(model(30, 20, seed=1).mul(0.01).to(dtype) + base, base)
    there = apply(base.double(), task_arithmetic([tau]))
    assert torch.equal(apply(there, task_arithmetic([tau], [-1.0])).to(dtype), base)
    rounded = apply(apply(base, task_arithmetic([tau])), task_arithmetic([tau], [-1.0]))
    torch.testing.assert_close(rounded, base, rtol=0, atol=torch.finfo(dtype).eps * base.abs().max().item())


def test_task_vectors_of_bf16_weights_are_exact_differences():
    """A difference taken in bf16 would be rounded to 8 bits."""
    a, b = torch.tensor([1.0078125]).bfloat16(), torch.tensor([0.0010]).bfloat16()
    assert task_vector(a, b).item() == a.double().item() - b.double().item()


def test_apply_scales_by_lambda_and_rounds_to_the_dtype_of_the_base():
    merged = apply(torch.tensor([1.0]).bfloat16(), torch.tensor([2.0]), lam=0.5)
    assert merged.item() == 2.0 and merged.dtype == torch.bfloat16
