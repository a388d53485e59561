"""QLoRA as a whole: a 4-bit base that never changes, and the ways back to one weight."""

import copy

import pytest
import torch
from torch import nn

from finetune_lab.methods.inject import active_layers, adapters, inject
from finetune_lab.methods.nf4_linear import NF4Linear
from finetune_lab.methods.qlora import merge_dequantized, merge_in_4bit, quantize_linears, replace_adapters


def network(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.ReLU(), nn.Linear(96, 32, bias=bias))


def qlora(size=1.0, bias=True):
    """A network with NF4 weights and adapters whose B is not zero; size: of the update."""
    model = inject(quantize_linears(network(bias)), r=4, alpha=8)
    for layer in active_layers(model).values():
        nn.init.normal_(layer.B, std=size)
    return model


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def test_every_linear_layer_becomes_four_bits():
    model = quantize_linears(network(), blocksize=32)
    assert [type(m) for m in model] == [NF4Linear, nn.ReLU, NF4Linear]
    assert all(m.blocksize == 32 for m in model if isinstance(m, NF4Linear))


def test_chosen_targets_only():
    model = quantize_linears(network(), targets=["0"])
    assert isinstance(model[0], NF4Linear) and type(model[2]) is nn.Linear


def test_training_moves_the_adapters_and_never_the_packed_weights():
    model = inject(quantize_linears(network()), r=4, alpha=8)
    before = {name: x.clone() for name, x in model.named_buffers()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.A", "0.B", "2.A", "2.B"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(X).square().mean()
    loss.backward()
    optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())
    assert model(X).square().mean() < loss


@pytest.mark.parametrize("bias", [True, False])
def test_merging_into_the_dequantised_base_keeps_the_outputs(bias):
    model = qlora(bias=bias)
    expected = model(X)
    replace_adapters(model, lambda path, layer: merge_dequantized(layer))
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear] and adapters(model) == {}
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


def test_the_merged_layer_wants_no_gradient():
    layer = merge_dequantized(active_layers(qlora())["0"])
    assert not layer.weight.requires_grad and not layer.bias.requires_grad


def test_merging_in_4_bit_swallows_a_small_update():
    layer = active_layers(qlora(size=1e-3))["0"]
    kept, lost = layer.delta(), layer.base_weight + layer.delta() - merge_in_4bit(layer).dequantize()
    assert kept.norm() < 0.02 * layer.base_weight.norm()
    assert lost.norm() > 0.7 * kept.norm()


def test_merging_in_4_bit_keeps_block_and_double_quantization():
    model = inject(quantize_linears(network(), blocksize=32, double_quant=False), r=4, alpha=8)
    merged = merge_in_4bit(active_layers(model)["0"])
    assert merged.blocksize == 32 and merged.absmax_codes is None


def test_the_route_sees_path_and_layer_and_the_original_stays():
    model = qlora()
    seen = []
    replace_adapters(copy.deepcopy(model), lambda path, layer: seen.append(path) or layer.base)
    assert seen == ["0", "2"] and list(active_layers(model)) == ["0", "2"]
