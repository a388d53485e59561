"""QLoRA as a whole: a model's linear layers in 4 bits, LoRA on top, and the way back to one plain weight.

Paper: QLoRA (Dettmers et al. 2023, arXiv 2305.14314, eq. 5). Formula: y = x dequantize(W)^T + scaling x A^T B^T.
The adapter learnt beside dequantize(W), rounding error included. So that is the weight it belongs to: merge there, in
full precision. A merge that rounds to the same 16 levels again loses most of the update: the old weights lie exactly on
levels, and an update smaller than half a step rounds back to them.
Leaves out: paged optimizers, adapters of other kinds. In production: transformers' `BitsAndBytesConfig`, peft.
"""

from collections.abc import Callable

from torch import nn

from finetune_lab.methods.inject import Targets, active_layers, find_targets
from finetune_lab.methods.lora import LoRALinear
from finetune_lab.methods.nf4_linear import NF4Linear


def quantize_linears(model: nn.Module, targets: Targets = "all-linear", **settings) -> nn.Module:
    """Replace linear layers of `model` by `NF4Linear`, in place; returns the model. All but the output head by default.

    settings go to `NF4Linear.from_linear`: blocksize, double_quant, compute_dtype. Then `inject` makes it QLoRA.
    """
    for path in find_targets(model, targets):
        model.set_submodule(path, NF4Linear.from_linear(model.get_submodule(path), **settings))
    return model


def merge_dequantized(layer: LoRALinear) -> nn.Linear:
    """The plain linear layer that acts like this QLoRA layer: dequantised base + scaling * B A, bias kept, frozen."""
    weight = layer.base.dequantize() + layer.scaling * layer.B @ layer.A
    bias = layer.base.bias
    merged = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    merged.weight = nn.Parameter(weight.detach(), requires_grad=False)
    merged.bias = bias
    return merged


def merge_in_4bit(layer: LoRALinear) -> NF4Linear:
    """The trap: the merged weight rounded to NF4 again, as merging into a 4-bit layer does (peft 0.21.2 warns of it)."""
    base = layer.base
    return NF4Linear.from_linear(merge_dequantized(layer), base.blocksize, base.absmax_codes is not None)


def replace_adapters(model: nn.Module, route: Callable[[str, LoRALinear], nn.Module]) -> nn.Module:
    """Put `route(path, layer)` where each active LoRA layer stands, in place; returns the model without an adapter."""
    for path, layer in active_layers(model).items():
        model.set_submodule(path, route(path, layer))
    model.adapters = {}
    return model
