"""NF4Linear against bitsandbytes' Linear4bit, kept safe from its faults: output and input gradient, bit for bit."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from finetune_lab.lab.bnb_faults import make_safe
from finetune_lab.methods.lora import LoRALinear
from finetune_lab.methods.nf4_linear import NF4Linear


def pair(n_in, n_out, dtype, bias, double_quant):
    torch.manual_seed(0)
    linear = nn.Linear(n_in, n_out, bias=bias)
    linear.weight.data *= torch.logspace(-1, 0, n_in)
    linear = linear.to(dtype)
    theirs = bnb.nn.Linear4bit(
        n_in, n_out, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=double_quant
    )
    theirs.load_state_dict(linear.state_dict())
    theirs = make_safe(theirs.to(dtype).to("cpu"))
    return NF4Linear.from_linear(linear, double_quant=double_quant), theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 32), (192, 256), (128, 33)])
def test_output_and_input_gradient_are_linear4bits(dtype, bias, double_quant, n_in, n_out):
    ours, theirs = pair(n_in, n_out, dtype, bias, double_quant)
    x = torch.randn(5, 7, n_in).to(dtype)
    grad = torch.randn(5, 7, n_out).to(dtype)
    results = []
    for layer in (ours, theirs):
        x = x.detach().requires_grad_()
        y = layer(x)
        results.append((y, torch.autograd.grad(y, x, grad)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_the_bytes_kept_are_linear4bits_bytes():
    ours, theirs = pair(512, 256, torch.float32, False, True)
    state = theirs.weight.quant_state
    kept = theirs.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    assert ours.quantized.nbytes == kept


def test_qlora_gradients_of_a_and_b_are_those_over_linear4bit():
    grads = []
    for base in pair(192, 96, torch.float32, False, True):
        torch.manual_seed(1)
        layer = LoRALinear(base, r=4, alpha=8) if isinstance(base, NF4Linear) else over_linear4bit(base)
        nn.init.normal_(layer.B)
        x = torch.randn(6, 192)
        layer(x).square().mean().backward()
        grads.append((layer.A.grad, layer.B.grad))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def over_linear4bit(base):
    """The same adapter over bitsandbytes' layer; its packed weight is a uint8 parameter, so the dtype is given."""
    return LoRALinear(base, r=4, alpha=8, dtype=torch.float32)
