"""What a merge will write, tensor by tensor, and every check that can be made before the first byte is written.

    plan = make_plan(config)
    plan.tensors[0].inputs          # {"tiny": "model.embed_tokens.weight", "runs/extract": ...}
    plan.warnings                   # what is allowed, and is seldom wanted

Layers are renumbered when slices are stacked; a gradient runs from the first layer of a slice (t = 0) to its last (1),
and tensors outside of the layers have t = 0, as in mergekit. A head that is tied to the embedding is not written twice.
"""

import re
from dataclasses import dataclass, field
from functools import reduce

import torch

from finetune_lab.errors import UserError
from finetune_lab.lab.merging import checks
from finetune_lab.lab.merging.checkpoint import Checkpoint, open_model
from finetune_lab.lab.merging.config import Config, Slice, resolve

LAYER = re.compile(r"(.*?\.?(?:layers|h|blocks|block))\.(\d+)\.(.+)")
FIRST = ("embed", "wte", "wpe")  # tensors before the layers; what else stands outside of them comes after


@dataclass(frozen=True)
class Planned:
    """One tensor of the result. inputs: {model: name of the tensor there}; parameters: as `merge_tensor` takes them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: dict[str, str]
    parameters: dict

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A checked merge."""

    config: Config
    models: dict[str, Checkpoint]
    tensors: list[Planned]
    layers: list[int]  # for each layer of the result: its number in the first source
    warnings: list[str] = field(default_factory=list)

    @property
    def donor(self) -> Checkpoint:
        """The model whose config and generation settings the result gets: the base, else the first."""
        return next(iter(self.models.values()))

    @property
    def tokenizer(self) -> Checkpoint:
        """The model whose tokenizer the result gets."""
        return self.models.get(self.config.tokenizer_source, self.donor)

    @property
    def bytes_read(self) -> int:
        return sum(self.models[m].tensors[name].nbytes for t in self.tensors for m, name in t.inputs.items())

    @property
    def bytes_written(self) -> int:
        return sum(t.nbytes for t in self.tensors)


def make_plan(config: Config) -> Plan:
    """Open every model, check them against each other, and list what is to be written. Raises UserError."""
    models = {name: open_model(name) for name in config.models()}
    for model in models.values():
        checks.drop_what_is_rebuilt(model)
    warnings = checks.same_architecture(list(models.values()))
    warnings += checks.same_vocabulary(list(models.values()))
    _check_tokenizer(config, models)
    stacks = {model: _layers_of(checkpoint) for model, checkpoint in models.items()}
    tensors, layers = _lay_out(config, models, stacks)
    _check_buffers(models, tensors)
    warnings += checks.same_base(config, models, tensors)
    warnings += checks.seldom_meant(config, {model: max(stack) + 1 for model, stack in stacks.items()})
    return Plan(config, models, tensors, layers, warnings)


def _layers_of(model: Checkpoint) -> dict[int, dict[str, str]]:
    """{layer: {what: name of the tensor}}; layer -1 holds the tensors before the layers, and -2 those after."""
    found: dict[int, dict[str, str]] = {-1: {}, -2: {}}
    for name in model.tensors:
        match = LAYER.fullmatch(name)
        if match:
            found.setdefault(int(match[2]), {})[f"{match[1]}.#.{match[3]}"] = name
        else:
            found[-1 if any(word in name for word in FIRST) else -2][name] = name
    return found


def _lay_out(config: Config, models: dict[str, Checkpoint], stacks: dict) -> tuple[list[Planned], list[int]]:
    tensors, layers = [], []
    counts = {model: max(stack) + 1 for model, stack in stacks.items()}
    tensors += _layer(
        config, config.slices[0], models, {s.model: stacks[s.model][-1] for s in config.slices[0].sources}, 0
    )
    for part in config.slices:
        ranges = {s.model: s.layers or (0, counts[s.model]) for s in part.sources}
        for model, (_, end) in ranges.items():
            if end > counts[model]:
                raise UserError(f"layer_range ends at {end}, but {model} has {counts[model]} layers.")
        if len({end - start for start, end in ranges.values()}) > 1:
            shown = ", ".join(f"{model} {count}" for model, count in counts.items())
            raise UserError(f"the models have different numbers of layers ({shown}): use slices with layer_range.")
        start, end = ranges[part.sources[0].model]
        for i in range(end - start):
            inputs = {model: stacks[model].get(first + i, {}) for model, (first, _) in ranges.items()}
            t = i / (end - start - 1) if end - start > 1 else 1.0
            tensors += _layer(config, part, models, inputs, t, number=len(layers))
            layers.append(start + i)
    last = config.slices[-1]
    tensors += _layer(config, last, models, {s.model: stacks[s.model][-2] for s in last.sources}, 0)
    return tensors, layers


def _layer(
    config: Config, part: Slice, models: dict[str, Checkpoint], inputs: dict, t: float, number: int | None = None
) -> list[Planned]:
    """The tensors of one layer, or of what stands before or after the layers. inputs: {model: {what: its name}}."""
    first, *others = inputs
    for other in others:
        if odd := inputs[first].keys() ^ inputs[other].keys():
            what = min(odd)
            has, lacks = (first, other) if what in inputs[first] else (other, first)
            shown = what.replace("#", "N")
            raise UserError(
                f"{has} has a tensor {shown} and {lacks} has none: only models with the same tensors merge."
            )
    planned = []
    for what in inputs[first]:
        names = {model: inputs[model][what] for model in inputs}
        stored = {model: models[model].tensors[name] for model, name in names.items()}
        checks.same_shape(what.replace("#", "N"), {model: s.shape for model, s in stored.items()})
        name = what.replace("#", str(number))
        dtypes = [s.dtype for s in stored.values()]
        floating = all(dtype.is_floating_point for dtype in dtypes)
        dtype = (config.dtype or reduce(torch.promote_types, dtypes)) if floating else dtypes[0]
        parameters = resolve(config, part, name, t, names) if floating else {}
        checks.normalizable(name, config.method, parameters)
        planned.append(Planned(name, stored[first].shape, dtype, names, parameters))
    return planned


def _check_tokenizer(config: Config, models: dict[str, Checkpoint]) -> None:
    """`base` and the name of a model are known; so is `union`, as the vocabularies are the same."""
    source = config.tokenizer_source
    if source not in (None, "base", "union", *models):
        raise UserError(f"tokenizer_source is {source!r}: choose base, or one of {', '.join(models)}.")


def _check_buffers(models: dict[str, Checkpoint], tensors: list[Planned]) -> None:
    """Tensors of whole numbers are copied, so they must be equal."""
    for planned in tensors:
        if not planned.dtype.is_floating_point:
            first, *others = (models[model].tensors[name].map() for model, name in planned.inputs.items())
            if not all(first.dtype == other.dtype and torch.equal(first, other) for other in others):
                raise UserError(f"{planned.name} holds {first.dtype} and differs between the models: it has no mean.")
