"""Preference losses trained to their end where the end is known."""

from functools import partial

import pytest
import torch

from finetune_lab.lab import tabular
from finetune_lab.methods.preference import (
    bradley_terry,
    cdpo_loss,
    dpo_loss,
    implicit_rewards,
    ipo_loss,
    kl_optimum,
    total_variation,
)

SURE = torch.tensor([[0.5, 1.0], [0.0, 0.5]])  # the first answer is always preferred
HALF = torch.tensor([0.5, 0.5])


def world(seed, n=5):
    g = torch.Generator().manual_seed(seed)
    reference, reward = torch.softmax(torch.randn(n, generator=g), 0), torch.randn(n, generator=g)
    return reference, reward, bradley_terry(reward[:, None], reward[None])


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_dpo_ends_at_the_optimum_of_reward_minus_beta_times_kl(seed, beta):
    reference, reward, prefer = world(seed)
    policy = tabular.train(reference, prefer, partial(dpo_loss, beta=beta), steps=150)["policy"]
    best = kl_optimum(reference, reward, beta)
    assert total_variation(reference, best) > 0.1  # there was a way to go
    assert total_variation(policy, best) <= 0.02
    implied = implicit_rewards(policy.log(), reference.log(), beta)
    torch.testing.assert_close(implied - implied[0], reward - reward[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("seed", range(2))
def test_ipo_ends_at_the_optimum_of_the_preference_itself(seed):
    """Its utility is the mean probability of being preferred (IPO paper), not the reward behind it."""
    reference, _, prefer = world(seed)
    policy = tabular.train(reference, prefer, partial(ipo_loss, tau=0.3), steps=150)["policy"]
    assert total_variation(policy, kl_optimum(reference, prefer.mean(1), 0.3)) <= 0.02


def test_a_preference_without_exception_sends_dpo_to_infinity_whatever_beta_says():
    for beta in (0.1, 1.0):
        margins = tabular.train(HALF, SURE, partial(dpo_loss, beta=beta), steps=800)["margins"]
        assert margins[799] > margins[399] + 0.5 > margins[199] + 1.0


def test_ipo_stops_at_half_over_tau_and_cdpo_where_its_doubt_says():
    ipo = tabular.train(HALF, SURE, partial(ipo_loss, tau=0.1), steps=400)["margins"][-1]
    cdpo = tabular.train(HALF, SURE, partial(cdpo_loss, beta=0.1, epsilon=0.1), steps=800)["margins"][-1]
    assert ipo == pytest.approx(5.0, abs=1e-3)
    assert cdpo == pytest.approx(torch.tensor(9.0).log().item() / 0.1, abs=0.05)


def test_a_pair_that_never_occurs_has_no_weight():
    chosen, rejected, weight = tabular.all_pairs(SURE)
    assert (chosen.tolist(), rejected.tolist(), weight.tolist()) == ([0], [1], [1.0])
