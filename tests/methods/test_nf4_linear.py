"""A linear layer in 4 bits: what it computes, what it keeps, what gets a gradient."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune_lab.lab.meter import peak_bytes
from finetune_lab.methods import nf4_linear
from finetune_lab.methods.lora import LoRALinear
from finetune_lab.methods.nf4_linear import NF4Linear


def layer(bias=True, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).to(dtype)
    return linear, NF4Linear.from_linear(linear, **settings)


def x_of(dtype=torch.float32, shape=(3, 5, 96)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (4, 96), (2, 3, 96)])
def test_forward_and_input_gradient_are_those_of_the_restored_weight(double_quant, bias, shape):
    linear, quantised = layer(bias, double_quant=double_quant)
    x = x_of(shape=shape)
    y = quantised(x)
    expected = F.linear(x, quantised.dequantize(), linear.bias)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x, g)[0])


def test_the_weight_has_no_gradient_and_is_no_parameter():
    _, quantised = layer(bias=False)
    assert list(quantised.parameters()) == []
    quantised(x_of()).sum().backward()
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in quantised.buffers())


def test_a_trainable_bias_gets_its_gradient():
    _, quantised = layer()
    quantised(x_of()).sum().backward()
    torch.testing.assert_close(quantised.bias.grad, torch.full((40,), 15.0))


def test_the_restored_weight_dies_within_the_layer(monkeypatch):
    restored = []

    def spy(q):
        w = dequantize(q)
        restored.append(weakref.ref(w))
        return w

    dequantize = nf4_linear.dequantize
    monkeypatch.setattr(nf4_linear, "dequantize", spy)
    _, quantised = layer()
    y = quantised(x_of())
    gc.collect()
    assert [r() for r in restored] == [None] and y.requires_grad
    y.sum().backward()
    assert len(restored) == 2  # once forward, once backward


def test_a_stack_of_layers_keeps_one_restored_weight_at_a_time():
    torch.manual_seed(0)
    width, depth = 256, 8
    dense = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    stack = nn.Sequential(*(NF4Linear.from_linear(linear) for linear in dense))
    x = torch.randn(4, width, requires_grad=True)
    assert peak_bytes(lambda: stack(x).sum().backward()) < 3 * width * width * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradient_have_the_dtype_of_the_input(dtype):
    _, quantised = layer(dtype=torch.bfloat16, compute_dtype=torch.float32)
    x = x_of(dtype)
    y = quantised(x)
    y.sum().backward()
    assert y.dtype == dtype == x.grad.dtype


def test_computing_in_bf16_differs_from_fp32_by_rounding_only():
    linear, _ = layer()
    exact = NF4Linear.from_linear(linear)(x_of())
    rough = NF4Linear.from_linear(linear, compute_dtype=torch.bfloat16)(x_of())
    assert 1e-4 < ((rough - exact).norm() / exact.norm()).item() < 1e-2


def test_scales_stay_fp32_when_the_model_is_cast():
    _, quantised = layer()
    before = quantised.dequantize()
    model = nn.Sequential(quantised).to(torch.bfloat16)
    assert model[0].absmax.dtype == torch.float32 and model[0].packed.dtype == torch.uint8
    assert torch.equal(model[0].dequantize(), before)


def test_state_dict_carries_the_weight_into_another_layer():
    _, one = layer()
    other = NF4Linear.from_linear(nn.Linear(96, 40))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x_of()), other(x_of()))


def test_bytes_are_those_of_four_bits_and_scales():
    torch.manual_seed(0)
    quantised = NF4Linear.from_linear(nn.Linear(512, 512, bias=False))
    assert quantised.quantized.nbytes == 512 * 512 // 2 + 4096 + 16 * 4 + 4
    stored = sum(buffer.nbytes for buffer in quantised.buffers())
    assert stored == quantised.quantized.nbytes + 64  # and the code book


def test_under_lora_only_the_adapter_is_trained_and_gradients_pass_through_the_layer():
    _, quantised = layer()
    adapted = LoRALinear(quantised, r=4, alpha=8)
    x = x_of()
    assert torch.equal(adapted(x), quantised(x))  # B starts at zero
    adapted(x).square().sum().backward()
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {"A", "B"}
    assert adapted.B.grad.abs().sum() > 0 and x.grad.abs().sum() > 0
