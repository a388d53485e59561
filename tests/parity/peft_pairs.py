"""One frozen layer with peft's adapter and with ours, holding the same values, and what is compared between them."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.lora import lora_scaling, rslora_scaling

PARTS = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude"}


class One(nn.Module):
    """A model of one layer: peft wraps models."""

    def __init__(self, layer):
        super().__init__()
        self.linear = layer

    def forward(self, x):
        return self.linear(x)


def base_layer(shape=(24, 40), bias=True, dtype=torch.float32, conv=False, seed=0):
    torch.manual_seed(seed)
    layer = Conv1D(nf=shape[1], nx=shape[0]) if conv else nn.Linear(*shape, bias=bias)
    return layer.to(dtype)


def pair(kind, base, r=4, alpha=8.0, dropout=0.0, rslora=False, cast=True):
    """(peft's layer, ours) over one frozen base, with the same trained values; peft's also as a model."""
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, target_modules=["linear"],
                        use_dora=issubclass(kind, DoRALinear), fan_in_fan_out=isinstance(base, Conv1D))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(One(base), config, autocast_adapter_dtype=cast)
    theirs = model.base_model.model.linear
    ours = kind(base, r, alpha, dropout, scale=rslora_scaling if rslora else lora_scaling,
                dtype=theirs.lora_A["default"].weight.dtype)  # fmt: skip
    with torch.no_grad():
        for name, part in their_parameters(theirs).items():
            if name == "magnitude":
                part.mul_(1 + 0.2 * torch.randn_like(part))
            else:
                part.normal_(std=0.2)
            getattr(ours, name).copy_(part)
    return theirs, ours, model


def their_parameters(layer):
    """peft's trained tensors under our names."""
    found = {}
    for theirs, ours in PARTS.items():
        holder = getattr(layer, theirs)
        if "default" in holder:
            found[ours] = holder["default"].weight
    return found


def run(layer, parameters, x, grad, seed=1):
    """Output and gradients of x and of the parameters; the seed decides the dropout."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters.values()], grad)]


def worst(kind, base, dtype=torch.float32, **kwargs):
    """Largest relative difference between ours and peft's, over the output and every gradient."""
    theirs, ours, _ = pair(kind, base, **kwargs)
    wanted = their_parameters(theirs)
    x = torch.randn(3, 11, ours.in_features).to(dtype)
    grad = torch.randn(3, 11, ours.out_features).to(dtype)
    theirs.train(), ours.train()
    a = run(theirs, wanted, x, grad)
    b = run(ours, {name: getattr(ours, name) for name in wanted}, x, grad)
    return max(float((p.double() - q.double()).norm() / p.double().norm()) for p, q in zip(a, b, strict=True))


def twenty_steps(layer, parameters, dtype=torch.float32):
    """Train the layer's parameters towards random targets; returns them."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    generator = torch.Generator().manual_seed(3)
    for step in range(20):
        x = torch.randn(8, layer.in_features, generator=generator).to(dtype)
        target = torch.randn(8, layer.out_features, generator=generator).to(dtype)
        torch.manual_seed(step)
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in parameters.items()}
