"""8-bit AdamW: near fp32 AdamW in result, two bytes a parameter in state."""

import pytest
import torch
from torch import nn

from finetune_lab.methods.adam8bit import AdamW8bit, moment_bytes


def train(optimizer_class, steps=200, resume_at=None):
    """A regression of 64 -> 96 outputs by one layer; returns the loss after each step and the optimizer."""
    torch.manual_seed(0)
    x, true = torch.randn(512, 64), torch.randn(64, 96) / 8
    y = x @ true + 0.1 * torch.randn(512, 96)
    weight = nn.Parameter(torch.zeros(64, 96))
    optimizer = optimizer_class([weight], lr=5e-3, weight_decay=0.01)
    losses = []
    for step in range(steps):
        if step == resume_at:
            kept = optimizer.state_dict()
            optimizer = optimizer_class([weight], lr=5e-3, weight_decay=0.01)
            optimizer.load_state_dict(kept)
        loss = (x @ weight - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def test_it_ends_where_adamw_ends():
    ours, _ = train(AdamW8bit)
    full, _ = train(torch.optim.AdamW)
    assert full[-1] < 0.02 and ours[-1] < 1.05 * full[-1]


def test_states_take_two_bytes_and_scales_instead_of_eight():
    _, ours = train(AdamW8bit, steps=1)
    n = 64 * 96
    assert ours.state_bytes() == 2 * n + 2 * 4 * n // 256 == moment_bytes(n)
    _, full = train(torch.optim.AdamW, steps=1)
    assert sum(v.nbytes for s in full.state.values() for v in s.values()) == 8 * n + 4  # and a step counter


def test_a_saved_and_loaded_state_goes_on_as_if_nothing_had_happened():
    straight, _ = train(AdamW8bit, steps=60)
    resumed, optimizer = train(AdamW8bit, steps=60, resume_at=30)
    assert resumed == straight
    (state,) = optimizer.state.values()
    assert state["m"].dtype == torch.uint8 and state["step"] == 60


def test_a_bf16_parameter_keeps_bytes_after_loading():
    p = nn.Parameter(torch.randn(80, 64).to(torch.bfloat16))
    p.grad = torch.randn_like(p)
    one = AdamW8bit([p])
    one.step()
    other = AdamW8bit([p])
    other.load_state_dict(one.state_dict())
    assert other.state[p]["m"].dtype == torch.uint8 and other.state[p]["absmax1"].dtype == torch.float32


def test_small_parameters_keep_fp32_moments():
    p = nn.Parameter(torch.randn(4095))
    p.grad = torch.randn(4095)
    optimizer = AdamW8bit([p])
    optimizer.step()
    assert optimizer.state[p]["m"].dtype == torch.float32 and optimizer.state_bytes() == 8 * 4095 == moment_bytes(4095)


def test_parameters_without_a_gradient_are_left_alone():
    p, frozen = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    AdamW8bit([p, frozen]).step()
    assert (frozen == 1).all() and (p < 1).all()


def test_groups_have_their_own_rate_and_the_closure_is_called():
    p, q = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    optimizer = AdamW8bit([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}], weight_decay=0)

    def closure():
        (p.sum() + q.sum()).backward()
        return 7

    assert optimizer.step(closure) == 7
    torch.testing.assert_close(torch.stack([p, q]).detach(), torch.tensor([[0.9] * 8, [0.8] * 8]))


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"eps": -1}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}])
def test_bad_settings_are_told(wrong):
    with pytest.raises(ValueError, match="must"):
        AdamW8bit([nn.Parameter(torch.ones(3))], **wrong)
