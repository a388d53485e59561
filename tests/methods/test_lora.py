"""LoRA and rsLoRA: what the layer is at the start, what moves first, how it scales, and how it merges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.lora import LoRALinear, dense_weight, features, lora_scaling, rslora_scaling
from finetune_lab.methods.lora_fused import FusedDoRALinear, FusedLoRALinear

KINDS = [LoRALinear, FusedLoRALinear, DoRALinear, FusedDoRALinear]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def linear(fan_in=12, fan_out=20, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(fan_in, fan_out, bias=bias).to(dtype)


def trained(kind, base, r=4, alpha=8.0, **kwargs):
    """An adapter as after training: B away from zero, DoRA's magnitudes away from the norms."""
    layer = kind(base, r, alpha, **kwargs)
    with torch.no_grad():
        layer.B.normal_(std=0.3)
        if isinstance(layer, DoRALinear):
            layer.magnitude.mul_(1 + 0.2 * torch.randn(layer.out_features))
    return layer


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    fan_in=st.integers(1, 24),
    fan_out=st.integers(1, 24),
    r=st.integers(1, 8),
    alpha=st.sampled_from([1.0, 16.0, 1e6]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_layer_starts_as_the_frozen_one_whatever_alpha_is(kind, fan_in, fan_out, r, alpha, bias, dtype):
    base = linear(fan_in, fan_out, bias, dtype)
    x = torch.randn(3, fan_in).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    y = kind(base, r, alpha)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, base(x), rtol=tolerance, atol=tolerance)


def test_plain_lora_starts_as_the_frozen_layer_bit_for_bit():
    base, x = linear(), torch.randn(5, 12)
    assert torch.equal(LoRALinear(base, 4, 1e6)(x), base(x))


def test_a_starts_uniform_within_one_over_the_root_of_the_inputs():
    torch.manual_seed(0)
    A = LoRALinear(linear(1024, 4), 64, 1).A
    assert A.abs().max() <= 1 / math.sqrt(1024)
    assert float(A.detach().std()) == pytest.approx(1 / math.sqrt(3 * 1024), rel=0.01)


@every_kind
def test_in_step_one_only_b_moves_the_gradient_of_a_is_zero(kind):
    layer = kind(linear(), 4, 8)
    layer(torch.randn(6, 12)).square().sum().backward()
    assert (layer.A.grad == 0).all() and (layer.B.grad != 0).any()


def test_with_a_and_b_at_zero_both_gradients_are_zero_and_training_is_locked():
    layer = LoRALinear(linear(), 4, 8)
    nn.init.zeros_(layer.A)
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=1.0)
    for _ in range(3):
        layer(torch.randn(6, 12)).square().sum().backward()
        assert (layer.A.grad == 0).all() and (layer.B.grad == 0).all()
        optimizer.step()
    assert (layer.delta() == 0).all()


def test_the_frozen_weights_get_no_gradient_and_x_does():
    layer = trained(LoRALinear, linear())
    x = torch.randn(2, 3, 12, requires_grad=True)
    layer(x).sum().backward()
    assert layer.base.weight.grad is None and layer.base.bias.grad is None and x.grad.shape == x.shape


@settings(max_examples=20, deadline=None)
@given(r=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_rank_of_the_update_is_at_most_r(r, seed):
    layer = trained(LoRALinear, linear(11, 17, seed=seed, dtype=torch.float64), r)
    assert torch.linalg.matrix_rank(layer.delta()) == r


@pytest.mark.parametrize("r", [1, 3, 16])
def test_alpha_and_r_act_through_their_quotient_only(r):
    layer, base = trained(LoRALinear, linear(), r, alpha=2.0 * r), linear()
    x = torch.randn(3, 12)
    by_hand = base(x) + 2.0 * x @ layer.A.T @ layer.B.T
    torch.testing.assert_close(layer(x), by_hand)


def test_twice_alpha_is_twice_the_update():
    one, two = trained(LoRALinear, linear(), alpha=3.0), LoRALinear(linear(), 4, 6.0)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(two.delta(), 2 * one.delta())


def output_scale(scale, r, width=64):
    """Standard deviation of the update's output, entries of A and B of fixed variance, mean of 8 draws."""
    found = []
    for seed in range(8):
        layer = LoRALinear(linear(width, width, seed=seed), r, 1.0, scale=scale)
        nn.init.normal_(layer.B, std=0.1)
        found.append((torch.randn(64, width) @ layer.delta().T).std())
    return float(torch.stack(found).mean().detach())


def test_rslora_keeps_the_scale_of_the_output_when_the_rank_grows_and_lora_does_not():
    stable = [output_scale(rslora_scaling, r) for r in (4, 16, 64)]
    plain = [output_scale(lora_scaling, r) for r in (4, 16, 64)]
    assert max(stable) < 1.15 * min(stable)
    assert plain[0] / plain[2] == pytest.approx(4, rel=0.15)  # sqrt(64 / 4)


def test_rslora_divides_by_the_root_of_r():
    assert LoRALinear(linear(), 16, 8.0, scale=rslora_scaling).scaling == 2.0
    assert LoRALinear(linear(), 16, 8.0).scaling == 0.5


def test_dropout_thins_the_update_only_and_stops_in_eval():
    layer = trained(LoRALinear, linear(64, 64), dropout=0.5)
    x = torch.randn(200, 64)
    runs = torch.stack([layer(x) for _ in range(2)])
    assert not torch.equal(runs[0], runs[1])
    many = torch.stack([layer(x[:2]) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(many, layer.eval()(x[:2]), atol=0.3, rtol=0)
    assert torch.equal(layer(x), layer(x))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_changes_the_output_by_rounding_only(kind, dtype):
    layer = trained(kind, linear(dtype=dtype))
    x = torch.randn(9, 12).to(dtype)
    before = layer(x)
    layer.merge()
    scale = before.abs().max()
    assert (layer(x) - before).abs().max() <= {torch.float32: 1e-6}.get(dtype, 2e-2) * scale
    assert (layer.base(x) == layer(x)).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit_and_merging_again_gives_the_same_bits(kind, dtype):
    layer = trained(kind, linear(dtype=dtype))
    original = layer.base.weight.clone()
    layer.merge()
    merged = layer.base.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.base.weight, original)
    layer.merge()
    assert torch.equal(layer.base.weight, merged) and not torch.equal(merged, original)


def test_a_merged_weight_in_bf16_is_the_exact_sum_rounded_once():
    layer = trained(LoRALinear, linear(dtype=torch.bfloat16))
    exact = (layer.base_weight.double() + layer.delta().double()).to(torch.bfloat16)
    layer.merge()
    assert (layer.base.weight != exact).sum() <= 1  # fp32 sum before the rounding: a tie may fall the other way


@every_kind
def test_a_second_merge_and_a_second_unmerge_are_refused(kind):
    layer = trained(kind, linear())
    layer.merge()
    with pytest.raises(ValueError, match="merged already"):
        layer.merge()
    layer.unmerge()
    with pytest.raises(ValueError, match="not merged"):
        layer.unmerge()


@every_kind
def test_weight_is_what_the_layer_multiplies_with_on_off_and_merged(kind):
    layer, x = trained(kind, linear(bias=False)), torch.randn(4, 12)
    for state in ("on", "off", "merged"):
        layer.enabled = state != "off"
        if state == "merged":
            layer.merge()
        torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-5, atol=1e-5)


@every_kind
def test_a_disabled_adapter_is_the_frozen_layer_bit_for_bit(kind):
    layer, x = trained(kind, linear()), torch.randn(4, 12)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


@every_kind
def test_conv1d_adapts_like_the_linear_layer_with_the_transposed_weight(kind):
    conv, base = Conv1D(nf=20, nx=12), linear()
    with torch.no_grad():
        conv.weight.copy_(base.weight.T)
        conv.bias.copy_(base.bias)
    plain = trained(kind, base)
    turned = kind(conv, 4, 8)
    turned.load_state_dict(plain.state_dict() | {"base.weight": conv.weight})
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(turned(x), plain(x), rtol=1e-5, atol=1e-5)
    turned.merge()
    torch.testing.assert_close(turned(x), plain(x), rtol=1e-5, atol=1e-5)
    turned.unmerge()
    assert torch.equal(conv.weight.T, base.weight)


def test_adapters_of_a_bf16_base_are_fp32_unless_told_otherwise():
    base = linear(dtype=torch.bfloat16)
    assert LoRALinear(base, 2, 4).A.dtype == torch.float32
    assert LoRALinear(base, 2, 4, dtype=torch.bfloat16).B.dtype == torch.bfloat16


class Quantised(nn.Module):
    """A stand-in for a 4-bit layer: codes in a buffer, a weight on demand."""

    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", weight.mul(16).round().to(torch.int8))

    def dequantize(self):
        return self.codes.float() / 16

    def forward(self, x):
        return x @ self.dequantize().T


@every_kind
def test_a_quantised_base_is_adapted_and_refuses_a_merge(kind):
    layer, x = trained(kind, Quantised(torch.randn(20, 12))), torch.randn(4, 12)
    assert layer.A.dtype == torch.float32
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="quantised"):
        layer.merge()


@pytest.mark.parametrize("r", [0, -2])
def test_a_rank_below_one_is_refused(r):
    with pytest.raises(ValueError, match=f"r is {r}"):
        LoRALinear(linear(), r, 8)


def test_a_layer_that_is_not_linear_is_refused_by_name():
    with pytest.raises(ValueError, match="Embedding is not a linear layer"):
        LoRALinear(nn.Embedding(5, 3), 2, 4)


def test_features_and_dense_weight_of_both_layouts():
    assert features(linear()) == features(Conv1D(20, 12)) == (12, 20)
    assert dense_weight(linear()).shape == dense_weight(Conv1D(20, 12)).shape == (20, 12)
