"""DoRA: magnitude and direction come apart as the paper says, and the norm is a constant of the backward pass."""

import pytest
import torch
from torch import nn

from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.lora_fused import FusedDoRALinear

both = pytest.mark.parametrize("kind", [DoRALinear, FusedDoRALinear], ids=lambda kind: kind.__name__)


def trained(kind, fan_in=12, fan_out=20, bias=False, alpha=8.0, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    layer = kind(nn.Linear(fan_in, fan_out, bias=bias).to(dtype), 4, alpha, dropout)
    with torch.no_grad():
        layer.B.normal_(std=0.3)
        layer.magnitude.mul_(1 + 0.2 * torch.randn(fan_out))
    return layer


@both
def test_magnitudes_start_at_the_row_norms_of_the_weight(kind):
    layer = kind(nn.Linear(7, 5), 2, 4)
    torch.testing.assert_close(layer.magnitude.data, layer.base.weight.norm(dim=1), rtol=1e-6, atol=0)


@both
def test_the_rows_of_the_weight_are_as_long_as_the_magnitudes(kind):
    layer = trained(kind)
    torch.testing.assert_close(layer.weight.norm(dim=1), layer.magnitude.abs())


@both
def test_the_direction_is_that_of_the_frozen_weight_plus_the_update(kind):
    layer = trained(kind)
    moved = layer.base_weight + layer.delta()
    torch.testing.assert_close(nn.functional.cosine_similarity(layer.weight, moved), torch.ones(20).double())


@both
def test_the_magnitude_alone_scales_outputs_and_leaves_directions(kind):
    layer = trained(kind)
    x = torch.randn(3, 12).double()
    before, direction = layer(x).detach(), nn.functional.normalize(layer.weight.detach(), dim=1)
    with torch.no_grad():
        layer.magnitude.mul_(3)
    torch.testing.assert_close(layer(x), 3 * before)
    torch.testing.assert_close(nn.functional.normalize(layer.weight, dim=1), direction)


@both
def test_the_update_alone_never_changes_a_rows_length(kind):
    layer = trained(kind)
    lengths = layer.weight.norm(dim=1)
    with torch.no_grad():
        layer.B.mul_(50)
    torch.testing.assert_close(layer.weight.norm(dim=1), lengths)


@both
def test_normalising_the_frozen_weight_first_would_be_another_layer(kind):
    """Equation 5 keeps W0 as it is; with W0 / ||W0|| the update would weigh ||W0|| times as much."""
    layer = trained(kind)
    unit = nn.functional.normalize(layer.base_weight, dim=1) + layer.delta()
    wrong = layer.magnitude[:, None] * nn.functional.normalize(unit, dim=1)
    assert (wrong - layer.weight).norm() > 0.05 * layer.weight.norm()


@both
def test_alpha_and_dropout_have_an_effect(kind):
    x = torch.randn(3, 12).double()
    assert not torch.allclose(trained(kind, alpha=8)(x), trained(kind, alpha=80)(x))
    thinned = trained(kind, dropout=0.5)
    assert not torch.equal(thinned(x), thinned(x))


@both
def test_the_norm_is_a_constant_for_the_gradient(kind):
    """Section 4.3: gradients are those of g * (W0 + s B A) with g held fixed, not those of the true quotient."""
    layer, x = trained(kind), torch.randn(6, 12).double()
    A, B, m = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.magnitude))
    moved = layer.base_weight + layer.scaling * B @ A
    norm = moved.norm(dim=1)
    weight_of_loss = torch.randn(6, 20).double()

    def gradients(length):
        return torch.autograd.grad(((x @ moved.T) * (m / length) * weight_of_loss).sum(), (A, B, m), retain_graph=True)

    constant, through = gradients(norm.detach()), gradients(norm)
    (layer(x) * weight_of_loss).sum().backward()
    for p, right in zip((layer.A, layer.B, layer.magnitude), constant, strict=True):
        torch.testing.assert_close(p.grad, right)
    assert (layer.B.grad - through[1]).norm() > 0.01 * through[1].norm()


@both
def test_a_pruned_row_stays_zero_instead_of_turning_into_nan(kind):
    base = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        base.weight[2] = 0
    layer = kind(base, 2, 4)
    y = layer(torch.randn(5, 6))
    y.sum().backward()
    assert (y[:, 2] == 0).all() and all(p.grad.isfinite().all() for p in (layer.A, layer.B, layer.magnitude))


@both
def test_a_magnitude_of_exactly_zero_still_learns(kind):
    layer = trained(kind)
    with torch.no_grad():
        layer.magnitude[3] = 0
    x = torch.randn(5, 12).double()
    layer(x).sum().backward()
    direction = nn.functional.normalize(layer.base_weight + layer.delta(), dim=1)
    torch.testing.assert_close(layer.magnitude.grad[3], (x @ direction[3]).sum())
