"""Claims about the DPO loss."""

import math

import pytest
import torch

from finetune_lab.methods.preference import dpo_loss, sequence_logps


def test_loss_is_log_two_while_the_policy_is_the_reference():
    c, r = torch.randn(5), torch.randn(5)
    assert dpo_loss(c, r, c, r, 0.1)[0].item() == pytest.approx(math.log(2))


def test_loss_can_fall_while_the_chosen_answer_becomes_less_likely():
    zero = torch.zeros(1)
    loss, chosen, rejected = dpo_loss(torch.tensor([-5.0]), torch.tensor([-20.0]), zero, zero, 0.1)
    assert loss.item() == pytest.approx(0.2014, abs=1e-4) and loss < math.log(2)
    assert (chosen.item(), rejected.item()) == (pytest.approx(-0.5), pytest.approx(-2.0))


def test_gradient_pushes_the_pair_apart_by_how_wrong_the_reward_is():
    """Paper, section 4: beta * sigmoid(rejected reward - chosen reward), up for chosen and down for rejected."""
    c, r = torch.tensor([-3.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    loss, chosen, rejected = dpo_loss(c, r, torch.tensor([-2.0]), torch.tensor([-2.0]), 0.5)
    loss.backward()
    weight = 0.5 * torch.sigmoid(rejected - chosen)
    assert torch.allclose(c.grad, -weight) and torch.allclose(r.grad, weight)
    assert not chosen.requires_grad


def test_logps_are_those_of_the_labelled_tokens_alone():
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 3, 1, -100], [-100, 4, 4, 0, 2]])
    logp = logits.log_softmax(-1)
    first = logp[0, 1, 3] + logp[0, 2, 1]
    second = sum(logp[1, t, labels[1, t + 1]] for t in range(4))
    assert torch.allclose(sequence_logps(logits, labels), torch.stack([first, second]), atol=1e-6)


def test_a_shared_prompt_cancels_in_the_difference_of_sums():
    """Counting the prompt is invisible in the loss of summed log-probabilities; the logged rewards do see it."""
    prompt = torch.randn(4, 1).squeeze(1)
    args = [torch.randn(4) for _ in range(4)]
    shifted = [args[0] + prompt, args[1] + prompt, args[2], args[3]]
    plain, dirty = dpo_loss(*args, 0.1), dpo_loss(*shifted, 0.1)
    assert torch.allclose(plain[0], dirty[0], atol=1e-6) and not torch.allclose(plain[1], dirty[1])
