"""Put adapters into a model, switch between them, add them up, merge them, take them out.

What: an adapter is a name and one `LoRALinear` (or a subclass) for each chosen linear layer. The active one stands in
the model where the linear layer stood; the others wait in `model.adapters` and share the same frozen layers. So
`model.parameters()` sees the active adapter only, and an idle one costs nothing.
Paper: LoRA, Hu et al. 2021, arXiv 2106.09685 (section 4.2: swap the update, keep the weights).
Leaves out: a different adapter for each row of a batch (S-LoRA), and parameters trained beside the adapters.
In production: `peft.get_peft_model`, `PeftModel.set_adapter`, `add_weighted_adapter(combination_type="cat")`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.lora import LoRALinear, features
from finetune_lab.methods.merging.adapters import Adapter, concatenate

Targets = str | Sequence[str]


def inject(
    model: nn.Module,
    targets: Targets = "all-linear",
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    layer: type[LoRALinear] = LoRALinear,
    adapter: str = "default",
    **kwargs,
) -> nn.Module:
    """Freeze `model`, wrap the target layers in `layer`, make this the active adapter; in place, returns the model.

    targets: "all-linear" (all but the output head), a list of names (`q_proj`, or a whole path), or another string,
        a regular expression for whole paths. As peft's `target_modules`.
    kwargs go to the layer: `scale=rslora_scaling`, `dtype`.
    Raises ValueError when nothing matches, a name matches nothing, the adapter exists, or one is merged.
    """
    paths = find_targets(model, targets)
    layers = {path: layer(_base(model, path), r, alpha, dropout, **kwargs) for path in paths}
    return add_adapter(model, adapter, layers)


def add_adapter(model: nn.Module, adapter: str, layers: Mapping[str, LoRALinear]) -> nn.Module:
    """Give `model` an adapter made of `layers` (path -> layer) and switch to it. Raises ValueError as `inject`."""
    if adapter in adapters(model):
        raise ValueError(f"the model has an adapter {adapter!r} already: give another name, or delete_adapter first")
    set_adapter(model, None).requires_grad_(False)  # the plain model: an adapter that waits stays trainable
    model.adapters = adapters(model) | {adapter: dict(layers)}
    for each in layers.values():
        each.train(model.training)
    return set_adapter(model, adapter)


def find_targets(model: nn.Module, targets: Targets) -> list[str]:
    """Paths of the linear layers that `targets` names, in the model's order. Raises ValueError as `inject` does."""
    linear = {path: module for path, module in _slots(model) if _is_linear(module)}
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = [path for path, module in linear.items() if module is not head]
    elif isinstance(targets, str):
        found = [path for path in linear if re.fullmatch(targets, path)]
    else:
        found = [path for path in linear if any(_named(path, name) for name in targets)]
        if lost := [name for name in targets if not any(_named(path, name) for path in linear)]:
            raise ValueError(f"no linear layer is called {lost[0]!r}; there are: {', '.join(_last_names(linear))}")
    if not found:
        raise ValueError(f"targets {targets!r} match no linear layer; there are: {', '.join(_last_names(linear))}")
    return found


def adapters(model: nn.Module) -> dict[str, dict[str, LoRALinear]]:
    """Every adapter of the model: name -> {path -> layer}; empty for a plain model."""
    return getattr(model, "adapters", {})


def active_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """path -> layer of the active adapter, read from the model itself."""
    return {path: module for path, module in _slots(model) if isinstance(module, LoRALinear)}


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter; None when the plain layers stand in the model."""
    layers = set(active_layers(model).values())
    return next((name for name, each in adapters(model).items() if layers & set(each.values())), None)


def set_adapter(model: nn.Module, adapter: str | None) -> nn.Module:
    """Make one adapter the active, trainable one; None puts the plain layers back. Returns the model.

    Raises ValueError for an unknown name and while an adapter is merged.
    """
    if adapter is not None:
        _known(model, adapter)
    _refuse_merged(model, "switch")
    for path, old in active_layers(model).items():
        model.set_submodule(path, old.base)
    for path, new in adapters(model).get(adapter, {}).items():
        base = model.get_submodule(path)
        home = next(chain(base.parameters(), base.buffers())).device
        model.set_submodule(path, new.to(home).train(model.training))
    return model


def delete_adapter(model: nn.Module, adapter: str) -> nn.Module:
    """Forget an adapter; if it was the active one, the plain model remains. Raises ValueError as `set_adapter`."""
    _known(model, adapter)
    if adapter == active_adapter(model):
        set_adapter(model, None)
    model.adapters = {name: each for name, each in adapters(model).items() if name != adapter}
    return model


@torch.no_grad()
def add_weighted(model: nn.Module, weights: Mapping[str, float], adapter: str) -> nn.Module:
    """A new active adapter whose update is exactly the weighted sum of the others' updates: sum of w_i s_i B_i A_i.

    weights: adapter name -> weight, of any sign. The As are stacked and the Bs put side by side, so the ranks add up
    (peft's `combination_type="cat"`; its "linear" adds the As and the Bs apart and makes another update).
    Raises ValueError for unknown names and for DoRA, whose updates do not add.
    """
    for name in weights:
        _known(model, name)
        if any(isinstance(layer, DoRALinear) for layer in adapters(model)[name].values()):
            raise ValueError(f"adapter {name!r} is a DoRA: its updates do not add up; merge it into a model instead")
    summed = {}
    for path in dict.fromkeys(path for name in weights for path in adapters(model)[name]):
        parts = [(w, adapters(model)[name][path]) for name, w in weights.items() if path in adapters(model)[name]]
        r = sum(part.r for _, part in parts)
        first = parts[0][1]
        layer = summed[path] = type(first)(first.base, r, alpha=r, dtype=first.A.dtype)  # scaling 1
        made = concatenate([Adapter(part.A, part.B, part.scaling) for _, part in parts], [w for w, _ in parts])
        layer.A.copy_(made.A)
        layer.B.copy_(made.B)
    return add_adapter(model, adapter, summed)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model answers as its frozen base: the reference of DPO, without a second copy.

    Raises ValueError while an adapter is merged.
    """
    _refuse_merged(model, "disable adapters")
    before = {layer: layer.enabled for layer in active_layers(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def merge(model: nn.Module) -> nn.Module:
    """Write the active adapter into the frozen weights; `unmerge` restores them bit for bit. Returns the model.

    Holds a copy of every adapted weight meanwhile. Raises ValueError when there is nothing to merge, when it is
    merged already, and when a weight is shared with a layer outside the adapter (a tied head).
    """
    layers = active_layers(model)
    if not layers:
        raise ValueError("the model has no active adapter: inject one, or set_adapter(model, name)")
    _refuse_merged(model, "merge again")
    uses: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(path)
    for path, layer in layers.items():
        shared = [
            use for use in uses.get(id(getattr(layer.base, "weight", None)), []) if not use.startswith(f"{path}.")
        ]
        if shared:
            raise ValueError(
                f"{path} shares its weight with {shared[0]}: merging would change both. Untie them first "
                f"(a copy of the weight for {path}), or keep the adapter unmerged"
            )
    for layer in layers.values():
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`. Raises ValueError when nothing is merged."""
    layers = [layer for layer in active_layers(model).values() if layer.merged]
    if not layers:
        raise ValueError("no adapter is merged: there is nothing to take out")
    for layer in layers:
        layer.unmerge()
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge for good: the plain model with the new weights, no adapter left. Raises ValueError as `merge`."""
    if not any(layer.merged for layer in active_layers(model).values()):
        merge(model)
    for path, layer in active_layers(model).items():
        model.set_submodule(path, layer.base)
    model.adapters = {}
    return model


def _slots(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and module of the whole tree, not looking inside adapters. A shared module appears at each of its places."""
    for name, child in module.named_children():
        yield prefix + name, child
        if not isinstance(child, LoRALinear):
            yield from _slots(child, f"{prefix}{name}.")


def _is_linear(module: nn.Module) -> bool:
    try:
        features(module)
    except ValueError:
        return False
    return True


def _base(model: nn.Module, path: str) -> nn.Module:
    module = model.get_submodule(path)
    return module.base if isinstance(module, LoRALinear) else module


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _last_names(paths) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _known(model: nn.Module, adapter: str) -> None:
    if adapter not in adapters(model):
        raise ValueError(f"no adapter {adapter!r}; the model has: {', '.join(adapters(model)) or 'none'}")


def _refuse_merged(model: nn.Module, what: str) -> None:
    if any(layer.merged for layer in active_layers(model).values()):
        raise ValueError(f"cannot {what} while an adapter is merged: call unmerge(model) first")
