"""The explorer of lesson 06 draws recorded points and a bound that can be checked by enumeration."""

import matplotlib.pyplot as plt
import pytest
import torch

from finetune_lab.course.frontier import Point, frontier
from finetune_lab.errors import UserError
from finetune_lab.methods.preference import kl_optimum
from finetune_lab.methods.scalars import least_kl

POINTS = {"beta 1": Point((0.7, 0.1), (0.9, 0.02), "Words 16."), "beta 0.1": Point((3.0, 0.5), (0.4, 0.1))}


def sentence(setting):
    figure, text = frontier(POINTS, 0.5, setting)
    plt.close(figure)
    return text


def test_the_closed_form_optimum_lies_on_the_bound_and_other_policies_do_not():
    """Reward 1 for good answers and 0 for bad ones: the optimum for every beta is a point of the curve."""
    reference, reward = torch.tensor([0.1, 0.3, 0.4, 0.2]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    for beta in (0.2, 1.0, 5.0):
        policy = kl_optimum(reference, reward, beta)
        kl = (policy * (policy / reference).log()).sum().item()
        assert kl == pytest.approx(least_kl((policy * reward).sum().item(), 0.4), abs=1e-6)
    torch.manual_seed(0)
    for policy in torch.rand(200, 4).softmax(-1):
        kl = (policy * (policy / reference).log()).sum().item()
        assert kl >= least_kl((policy * reward).sum().item(), 0.4) - 1e-6


def test_the_sentence_tells_both_axes_and_what_the_share_needs():
    text = sentence("beta 1")
    assert "90 ± 2 % good" in text and "KL 0.70 ± 0.10" in text and f"at least {least_kl(0.9, 0.5):.2f}" in text
    assert text.endswith("Words 16.")


def test_the_title_names_a_loss():
    figure, _ = frontier(POINTS, 0.5, "beta 0.1")
    assert figure.axes[0].get_title(loc="left") == "beta 0.1: worse than the start"
    plt.close(figure)


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="beta 1, beta 0.1"):
        frontier(POINTS, 0.5, "beta 2")
