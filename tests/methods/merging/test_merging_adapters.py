"""Merging LoRA adapters: the sum of updates, its best low-rank form, and the sum of factors that is neither."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.methods.merging import Adapter, concatenate, factorize, linear_factors, svd, update


def adapters(ranks, out=30, inn=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        Adapter(torch.randn(r, inn, generator=g), torch.randn(out, r, generator=g), 2.0 / (1 + i))
        for i, r in enumerate(ranks)
    ]


def exact(parts, weights):
    return sum(w * a.scaling * a.B.double() @ a.A.double() for w, a in zip(weights, parts, strict=True))


def error(adapter, wanted):
    return ((update(adapter).double() - wanted).norm() / wanted.norm()).item()


@settings(deadline=None, max_examples=40)
@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_concatenation_is_the_exact_weighted_sum_of_the_updates(ranks, seed):
    parts = adapters(ranks, seed=seed)
    weights = [0.7, -0.4, 1.5, 0.2][: len(ranks)]
    merged = concatenate(parts, weights)
    assert len(merged.A) == sum(ranks) and error(merged, exact(parts, weights)) < 1e-6


def test_svd_with_the_sum_of_the_ranks_is_exact():
    parts = adapters((3, 4))
    assert error(svd(parts, [0.7, 0.3], rank=7), exact(parts, [0.7, 0.3])) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_of_a_smaller_rank_is_the_best_approximation_there_is(rank):
    """Eckart and Young: the error is the norm of the singular values that were cut off."""
    parts = adapters((4, 4))
    wanted = exact(parts, [1.0, 1.0])
    cut = torch.linalg.svdvals(wanted)[rank:].norm() / wanted.norm()
    assert error(svd(parts, rank=rank), wanted) == pytest.approx(cut.item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_svd_of_the_thin_factors_is_the_svd_of_the_dense_update_in_fp64(seed):
    """Decomposed in fp32 it would be 1e-6 away, as peft's is."""
    parts = adapters((4, 4), seed=seed)
    U, S, Vh = torch.linalg.svd(exact(parts, [0.5, 0.5]), full_matrices=False)
    assert error(svd(parts, [0.5, 0.5]), (U[:, :4] * S[:4]) @ Vh[:4]) < 3e-7


def test_svd_keeps_the_largest_rank_of_its_parts_by_default():
    assert len(svd(adapters((2, 5))).A) == 5


def test_a_wide_and_a_narrow_layer_work_as_well():
    """The ranks add up to more than the layer has inputs."""
    parts = adapters((4, 4), out=30, inn=5)
    assert error(svd(parts, rank=8), exact(parts, [1.0, 1.0])) < 1e-6


def test_factorize_gives_back_an_update_of_its_rank():
    wanted = exact(adapters((3,)), [1.0])
    assert error(factorize(wanted, 3), wanted) < 1e-6


def test_adding_factors_is_far_from_adding_updates():
    """Two unrelated adapters with weights of 1/2: the cross terms B_1 A_2 and B_2 A_1 are as large as the update."""
    g = torch.Generator().manual_seed(0)
    parts = [Adapter(torch.randn(8, 200, generator=g), torch.randn(300, 8, generator=g)) for _ in range(2)]
    assert error(linear_factors(parts, [0.5, 0.5]), exact(parts, [0.5, 0.5])) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("weight", [0.7, -0.4])
def test_adding_factors_is_exact_for_a_single_adapter(weight):
    parts = adapters((4,))
    assert error(linear_factors(parts, [weight]), exact(parts, [weight])) < 1e-6


def test_adapters_of_unequal_rank_have_no_sum_of_factors():
    with pytest.raises(ValueError, match=r"ranks 2, 3: .* use concatenate or svd"):
        linear_factors(adapters((2, 3)))


@pytest.mark.parametrize("merge", [concatenate, svd, linear_factors])
def test_adapters_of_different_layers_are_refused(merge):
    with pytest.raises(ValueError, match="must belong to one layer"):
        merge([*adapters((2,)), *adapters((2,), out=31)])


@pytest.mark.parametrize("merge", [concatenate, linear_factors])
def test_a_missing_weight_is_refused(merge):
    with pytest.raises(ValueError, match="1 weights for 2 adapters"):
        merge(adapters((2, 2)), [1.0])


@pytest.mark.parametrize("merge", [concatenate, linear_factors])
def test_no_adapter_at_all_is_refused(merge):
    with pytest.raises(ValueError, match="at least one"):
        merge([])


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="rank is 0"):
        factorize(torch.ones(3, 3), 0)
