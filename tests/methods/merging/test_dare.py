"""DARE: what is dropped, what is scaled up, and that the mean stays."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.methods.merging import dare, dare_linear, dare_ties, ties_merge


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=50)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    p=st.floats(0, 0.99),
)
def test_every_entry_is_zero_or_scaled_by_one_over_one_minus_p(shape, dtype, p):
    tau = torch.randn(shape, generator=seeded()).to(dtype)
    dropped = dare(tau, p, seeded(1))
    assert dropped.dtype == dtype and dropped.shape == tau.shape
    assert ((dropped == 0) | torch.isclose(dropped, tau / (1 - p))).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_the_expectation_is_the_input(p):
    """Means of 200 draws, in standard errors |tau| sqrt(p / (1-p) / 200) of each of 2000 entries.

    No entry is off by 8 (at p = 0.99 survivors are counted by a skewed distribution, Poisson of mean 2), and their
    average not by 5 / sqrt(2000): an unbiased DARE fails this once in 10,000 seeds at most.
    """
    tau, draws, g = torch.randn(2000, generator=seeded()), 200, seeded(1)
    mean = sum(dare(tau, p, g) for _ in range(draws)) / draws
    standard_errors = (mean - tau) / (tau.abs() * math.sqrt(p / (1 - p) / draws))
    assert standard_errors.abs().max() < 8
    assert abs(standard_errors.mean().item()) < 5 / math.sqrt(2000)


def test_the_standard_deviation_grows_threefold_at_p_09():
    tau = torch.randn(200_000, generator=seeded())
    assert (dare(tau, 0.9, seeded(1)).std() / tau.std()).item() == pytest.approx(math.sqrt(1 / (1 - 0.9)), rel=0.02)


def test_the_seed_decides_what_is_dropped():
    tau = torch.ones(100)
    assert torch.equal(dare(tau, 0.5, seeded(3)), dare(tau, 0.5, seeded(3)))
    assert not torch.equal(dare(tau, 0.5, seeded(3)), dare(tau, 0.5, seeded(4)))


def test_every_model_gets_a_mask_of_its_own():
    """With one mask for all, the sum of two opposite task vectors would be zero everywhere."""
    tau = torch.ones(100)
    assert dare_linear([tau, -tau], 0.5, generator=seeded()).any()


def test_dropping_nothing_is_task_arithmetic_and_ties():
    tau = list(torch.randn(3, 6, 5, generator=seeded()))
    torch.testing.assert_close(dare_linear(tau, 0.0, [1.0, -0.5, 2.0]), tau[0] - 0.5 * tau[1] + 2 * tau[2])
    assert torch.equal(dare_ties(tau, 0.0), ties_merge(tau, 1.0))


def test_dare_ties_is_ties_among_the_survivors():
    tau = list(torch.randn(3, 40, generator=seeded()))
    g = seeded(1)
    survivors = [dare(x, 0.6, g) for x in tau]
    assert torch.equal(dare_ties(tau, 0.6, generator=seeded(1)), ties_merge(survivors, 1.0))


@pytest.mark.parametrize("p", [-0.1, 1.0, 90])
def test_a_drop_rate_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match=r"90 % is 0\.9"):
        dare(torch.ones(3), p)
