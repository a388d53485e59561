"""Block-wise 8 bits and 8-bit AdamW against bitsandbytes' CPU build: the same bits."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from finetune_lab.methods.adam8bit import AdamW8bit
from finetune_lab.methods.blockwise import dequantize_blockwise, quantize_blockwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 200_003])
def test_codes_scales_and_restored_values_are_bitsandbytes(dtype, signed, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    x = (x if signed else x.square()).to(dtype)
    x[300:600] = 0
    code = bnb.functional.create_dynamic_map(signed=signed)
    theirs, state = bnb.functional.quantize_blockwise(x, code=code, blocksize=256)
    codes, absmax = quantize_blockwise(x, signed)
    assert torch.equal(codes, theirs) and torch.equal(absmax, state.absmax)
    back = dequantize_blockwise(codes, absmax, signed).to(dtype)
    assert torch.equal(back, bnb.functional.dequantize_blockwise(theirs, state).to(dtype))


SHAPES = [(100, 100), (64, 64), (77, 93)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_forty_steps_of_adamw_give_the_same_weights_and_states_to_the_bit(dtype, weight_decay):
    g = torch.Generator().manual_seed(0)
    ours = [nn.Parameter((0.1 * torch.randn(shape, generator=g)).to(dtype)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    one, other = AdamW8bit(ours, **settings), bnb.optim.AdamW8bit(theirs, **settings)
    for step in range(40):
        for p, q in zip(ours, theirs, strict=True):
            size = 10.0 ** -(step % 4)  # gradients of unlike size, a third of them zero
            grad = size * torch.randn(p.shape, generator=g) * (torch.rand(p.shape, generator=g) > 0.3)
            p.grad, q.grad = grad.to(dtype), grad.to(dtype)
        one.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for mine, name in {"m": "state1", "v": "state2", "absmax1": "absmax1", "absmax2": "absmax2"}.items():
            assert torch.equal(one.state[p][mine], other.state[q][name])


def test_a_small_parameter_with_fp32_moments_agrees_to_an_ulp():
    """bitsandbytes' 32-bit path multiplies the two corrections in another order."""
    g = torch.Generator().manual_seed(1)
    ours = nn.Parameter(torch.randn(500, generator=g))
    theirs = nn.Parameter(ours.detach().clone())
    one, other = AdamW8bit([ours]), bnb.optim.AdamW8bit([theirs])
    for _ in range(30):
        ours.grad = torch.randn(500, generator=g)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=5e-7, atol=3e-8)
    assert torch.equal(one.state[ours]["m"], other.state[theirs]["state1"])
