"""The hand-written passes compute what the plain forms compute, and hold less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune_lab.lab.meter import peak_bytes
from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.lora import LoRALinear
from finetune_lab.methods.lora_fused import FusedDoRALinear, FusedLoRALinear

PAIRS = [(LoRALinear, FusedLoRALinear), (DoRALinear, FusedDoRALinear)]
each_pair = pytest.mark.parametrize(("plain", "fused"), PAIRS, ids=["LoRA", "DoRA"])


def twins(plain, fused, fan_in, fan_out, r=4, bias=True, dtype=torch.float32, seed=0):
    """A plain and a fused layer over one frozen base, with the same trained parameters."""
    torch.manual_seed(seed)
    base = nn.Linear(fan_in, fan_out, bias=bias).to(dtype)
    one = plain(base, r, 2.0 * r)
    with torch.no_grad():
        one.B.normal_(std=0.2)
        if plain is DoRALinear:
            one.magnitude.mul_(1 + 0.2 * torch.randn(fan_out))
    two = fused(base, r, 2.0 * r)
    two.load_state_dict(one.state_dict())
    return one, two


def everything(layer, x, grad):
    """Output and gradients of x and of every trained parameter."""
    x = x.clone().requires_grad_()
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], grad)]


def worst(ours, theirs):
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, theirs, strict=True))


@each_pair
@settings(max_examples=20, deadline=None)
@given(
    fan_in=st.integers(1, 40),
    fan_out=st.integers(1, 40),
    r=st.integers(1, 9),
    bias=st.booleans(),
    shape=st.sampled_from([(1,), (7,), (2, 3), (2, 1, 5)]),
    seed=st.integers(0, 99),
)
def test_output_and_every_gradient_equal_the_plain_form(plain, fused, fan_in, fan_out, r, bias, shape, seed):
    one, two = twins(plain, fused, fan_in, fan_out, r, bias, torch.float64, seed)
    x, grad = torch.randn(*shape, fan_in).double(), torch.randn(*shape, fan_out).double()
    for a, b in zip(everything(two, x, grad), everything(one, x, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@each_pair
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_agrees_to_the_rounding_of_the_dtype(plain, fused, dtype, tolerance):
    one, two = twins(plain, fused, 96, 160, dtype=dtype)
    x, grad = torch.randn(33, 96).to(dtype), torch.randn(33, 160).to(dtype)
    assert worst(everything(two, x, grad), everything(one, x, grad)) < tolerance


def test_lora_passes_the_numerical_check_of_gradients():
    """DoRA cannot: its norm is a constant on purpose, and finite differences see it move (test_dora checks it)."""
    _, layer = twins(LoRALinear, FusedLoRALinear, 5, 7, r=2, dtype=torch.float64)
    x = torch.randn(4, 5).double().requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.A, layer.B))


@each_pair
def test_an_input_that_wants_no_gradient_costs_none_and_changes_nothing(plain, fused):
    one, two = twins(plain, fused, 8, 6)
    x = torch.randn(5, 8)
    for layer in (one, two):
        layer(x).square().sum().backward()
    torch.testing.assert_close(two.A.grad, one.A.grad)
    torch.testing.assert_close(two.B.grad, one.B.grad)


@each_pair
@pytest.mark.parametrize("turned", [False, True], ids=["turned gradient", "turned input"])
def test_tensors_in_any_memory_order_are_welcome(plain, fused, turned):
    one, two = twins(plain, fused, 8, 6, dtype=torch.float64)
    x, grad = torch.randn(4, 3, 8).double(), torch.randn(4, 3, 6).double()
    if turned:
        x = torch.randn(3, 4, 8).double().transpose(0, 1)
    else:
        grad = torch.randn(3, 4, 6).double().transpose(0, 1)
    for a, b in zip(everything(two, x, grad), everything(one, x, grad), strict=True):
        torch.testing.assert_close(a, b)
    two(x).sum().backward()  # an expanded gradient
    assert two.B.grad.isfinite().all()


@each_pair
def test_dropout_takes_the_plain_form_with_the_same_mask(plain, fused):
    one, two = twins(plain, fused, 16, 24)
    one.dropout.p = two.dropout.p = 0.4
    outputs = []
    for layer in (one, two):
        torch.manual_seed(5)
        outputs.append(layer(torch.ones(3, 16)))
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


@each_pair
def test_a_base_that_is_unfrozen_again_gets_its_gradient(plain, fused):
    _, layer = twins(plain, fused, 8, 6)
    layer.base.requires_grad_()
    layer(torch.randn(5, 8)).sum().backward()
    assert layer.base.weight.grad is not None


def test_the_norm_by_the_identity_equals_the_norm_of_the_sum():
    one, two = twins(DoRALinear, FusedDoRALinear, 64, 96)
    torch.testing.assert_close(two.direction_norm(), one.direction_norm(), rtol=1e-6, atol=0)


def test_the_cached_norm_follows_a_base_that_is_loaded_later():
    one, two = twins(DoRALinear, FusedDoRALinear, 16, 24)
    two(torch.randn(2, 16))
    two.base.load_state_dict(nn.Linear(16, 24).state_dict())  # one and two share this base
    torch.testing.assert_close(two.direction_norm(), one.direction_norm())


def test_a_changed_output_is_noticed_by_the_backward_pass():
    """DoRA keeps its own output for the gradient of the magnitude: changing it in place must not go unseen."""
    _, layer = twins(DoRALinear, FusedDoRALinear, 8, 6, bias=False)
    y = layer(torch.randn(5, 8))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_fused_dora_makes_no_temporary_of_the_weights_size():
    one, two = twins(DoRALinear, FusedDoRALinear, 512, 512, bias=False)
    x = torch.randn(8, 512)
    weight = 512 * 512 * 4
    assert peak_bytes(lambda: one(x).sum().backward()) > 2 * weight
    assert peak_bytes(lambda: two(x).sum().backward()) < weight / 4
