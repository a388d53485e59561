"""The short forms of lesson 03 do what the package's own layers do."""

import pytest
import torch
from torch import nn

from finetune_lab.methods import dora, lora, plain


def pair(bias=True, dropout=0.0, dtype=torch.float32):
    """The same adapted layer, short and full."""
    torch.manual_seed(0)
    base = nn.Linear(12, 20, bias=bias, dtype=dtype)
    layers = plain.LoRALinear(base, 3, 6, dropout), lora.LoRALinear(base, 3, 6, dropout)
    A, B = torch.randn(3, 12), torch.randn(20, 3)
    for layer in layers:
        layer.A.data.copy_(A)
        layer.B.data.copy_(B)
    return layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_short_lora_computes_what_the_full_one_does_and_so_do_its_gradients(bias, dropout):
    outputs = []
    x = torch.randn(5, 12)
    for layer in pair(bias, dropout):
        torch.manual_seed(1)
        y = layer(x)
        y.square().sum().backward()
        outputs.append((y, layer.A.grad, layer.B.grad))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_short_merge_is_the_full_merge_bit_for_bit(dtype):
    full = pair(dtype=torch.float32)[1]
    full.base.to(dtype)
    merged = plain.merged_weight(full.base.weight, full.A, full.B, full.scaling)
    full.merge()
    assert merged.dtype == dtype and torch.equal(merged, full.base.weight)


def test_the_short_dora_weight_is_the_full_one():
    torch.manual_seed(0)
    full = dora.DoRALinear(nn.Linear(12, 20), 3, 6)
    full.B.data.normal_()
    full.magnitude.data.mul_(1.3)
    short = plain.dora_weight(full.base.weight, full.delta(), full.magnitude)
    torch.testing.assert_close(short, full.adapted_weight(), rtol=1e-5, atol=1e-6)


def test_dora_starts_as_the_frozen_weight():
    weight = torch.randn(20, 12)
    assert torch.allclose(plain.dora_weight(weight, torch.zeros(20, 12), weight.norm(dim=1)), weight, atol=1e-6)
