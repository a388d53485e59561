"""Claims about SLERP and TIES."""

import math

import pytest
import torch

from finetune_lab.methods.merging import slerp, ties, trim


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return x / x.norm()


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


@pytest.mark.parametrize("zero", [0, 1])
def test_a_zero_tensor_such_as_a_fresh_lora_b_gives_no_nan(zero):
    pair = [torch.ones(3, 2), torch.ones(3, 2)]
    pair[zero] = torch.zeros(3, 2)
    assert torch.equal(slerp(*pair, 0.25), 0.75 * pair[0] + 0.25 * pair[1])


def test_slerp_keeps_the_dtype_and_refuses_unequal_shapes():
    assert slerp(unit(4, 3).bfloat16(), unit(4, 3, seed=5).bfloat16(), 0.3).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        slerp(torch.ones(2), torch.ones(1), 0.5)


def test_the_sign_is_elected_by_total_not_by_count():
    vectors = [torch.tensor([x]) for x in (1.0, -0.3, -0.3)]
    assert ties(vectors, 1.0).item() == 1.0


def test_only_entries_that_agree_are_averaged():
    vectors = [torch.tensor([x]) for x in (4.0, 2.0, -1.0)]
    assert ties(vectors, 1.0).item() == 3.0


def test_trim_keeps_signs_and_the_largest_share():
    assert trim(torch.tensor([-1.0, 0.2, 0.1, 0.05]), 0.5).tolist() == [-1.0, pytest.approx(0.2), 0.0, 0.0]


def test_identical_models_merge_into_their_trimmed_selves():
    x = torch.randn(6, 5)
    assert torch.allclose(ties([x, x, x], 0.2), trim(x, 0.2))


@pytest.mark.parametrize("density", [0, 1.5, 20])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match="20 % is 0.2"):
        ties([torch.ones(3)], density)
