"""Loss scaling: what fp16 loses, what the scale saves, and GradScaler's rule."""

import random

import pytest
import torch

from finetune_lab.lab import models
from finetune_lab.methods.loss_scaling import DynamicScaler, fp16_losses, unscale_


@pytest.mark.parametrize("seed", range(3))
def test_the_scale_follows_torchs_grad_scaler_through_any_overflows(seed):
    rng = random.Random(seed)
    ours = DynamicScaler(scale=2.0**10, growth=4.0, backoff=0.25, interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for _ in range(40):
        overflow = rng.random() < 0.3
        theirs.scale(weight.sum()).backward()
        if overflow:
            weight.grad[0] = rng.choice([torch.inf, torch.nan])
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(overflow)
        assert ours.scale == theirs.get_scale()


def test_a_static_scale_never_moves():
    scaler = DynamicScaler(scale=128, growth=1, backoff=1, interval=1)
    for overflow in (True, False, True):
        scaler.update(overflow)
    assert scaler.scale == 128


def test_unscale_gives_the_gradients_back_and_tells_of_overflow():
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    weights[0].grad, weights[1].grad = torch.tensor([2.0, 4.0, 6.0]), torch.ones(3)  # the third has none
    assert not unscale_(weights, 2.0)
    assert weights[0].grad.tolist() == [1, 2, 3]
    weights[1].grad[1] = torch.inf
    assert unscale_(weights, 2.0)


def test_fp16_loses_what_is_below_half_of_its_smallest_number_and_above_its_largest():
    smallest = 2.0**-24
    sizes = torch.tensor([0.0, smallest * 0.49, smallest * 0.51, 2.0**-15, 1.0, -65504.0, 70000.0, -torch.inf])
    lost = fp16_losses([sizes])
    assert lost == {"zero": 1 / 7, "subnormal": 2 / 7, "infinite": 2 / 7}


def test_a_scale_moves_the_window():
    gradients = [torch.tensor([1e-9, 1e-3, 1.0])]
    assert fp16_losses(gradients)["zero"] == 1 / 3
    assert fp16_losses(gradients, 2.0**10) == {"zero": 0, "subnormal": 1 / 3, "infinite": 0}
    assert fp16_losses(gradients, 2.0**17)["infinite"] == 1 / 3


def test_gradients_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="no nonzero entry"):
        fp16_losses([torch.zeros(3)])


def test_real_gradients_underflow_in_fp16_and_a_scale_of_1024_saves_most_of_them():
    model, tokenizer = models.load("tiny")
    ids = torch.tensor([tokenizer.encode("The flag of Veldale is red.")])
    gradients = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    plain, scaled = fp16_losses(gradients), fp16_losses(gradients, 2.0**10)
    assert plain["zero"] > 10 * scaled["zero"] and plain["zero"] > 1e-4
    assert plain["infinite"] == scaled["infinite"] == 0
