"""The recipe of a merge: mergekit's YAML, read into a checked dataclass. Every bad value is one clear sentence.

    merge_method: ties                    linear, slerp, task_arithmetic, ties, dare_linear or dare_ties
    base_model: tiny
    models:                               or `slices`: ranges of layers, stacked in the given order
      - model: runs/extract
        parameters:
          weight: 1.0
          density: [0.2, 0.5]             a gradient: from the first layer to the last
      - model: runs/math
        parameters:
          weight:
            - filter: mlp                 the first filter that is part of a tensor's name counts
              value: 0.3
            - value: 1.0
    parameters: {lambda: 1.0}
    dtype: bfloat16

Same keys, defaults and order of precedence as mergekit 0.1.5, with two differences: what mergekit would ignore in
silence (an unknown parameter, a density for a method that trims nothing) is refused here, and so is a density or a t
outside of 0 to 1.
Leaves out: the other methods, `modules`, the `tokenizer` block, `chat_template`, and a base model of its own for a slice.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from finetune_lab.errors import UserError
from finetune_lab.lab.merging.parameters import METHODS, REQUIRED, SWITCHES, evaluate, known, read_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Source:
    """One model of a slice. layers: half-open range, None for all; parameters: as written."""

    model: str
    layers: tuple[int, int] | None = None
    parameters: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Models whose layers are merged with each other, and settings for them all."""

    sources: tuple[Source, ...]
    parameters: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """A whole merge. `models:` is one slice of all layers, as in mergekit."""

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Mapping = field(default_factory=dict)
    dtype: torch.dtype | None = None  # of what is written; None: the widest of the models
    tokenizer_source: str | None = None
    text: str = ""

    def models(self) -> list[str]:
        """Every model by the name it is given, the base first; each once."""
        named = [source.model for each in self.slices for source in each.sources]
        return list(dict.fromkeys([*([self.base] if self.base else []), *named]))


def load(config: str | Path | Mapping) -> Config:
    """The recipe in a YAML file, or in a dict of the same content. Raises UserError, one sentence."""
    if isinstance(config, Mapping):
        return read(config, yaml.safe_dump(dict(config), sort_keys=False))
    path = Path(config).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{config} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{config} holds no settings: a merge needs merge_method and models.")
    return read(value, text)


def read(value: Mapping, text: str = "") -> Config:
    """Check the content of a YAML file and turn it into a Config."""
    known(value, ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
                   "tokenizer_source"), "the config", {"modules": "", "tokenizer": "tokenizer_source", "chat_template": ""})  # fmt: skip
    method = value.get("merge_method")
    if method not in METHODS:
        near = difflib.get_close_matches(str(method).lower(), METHODS, 1)
        meant = f"did you mean {near[0]}? There are" if near else "choose one of"
        raise UserError(f"merge_method is {method!r}: {meant} {', '.join(METHODS)}.")
    base = _name(value["base_model"], "base_model") if value.get("base_model") is not None else None
    if METHODS[method].base and base is None:
        raise UserError(f"{method} needs base_model: " + _WHY_BASE["slerp" if method == "slerp" else "task"])
    if bool(value.get("models")) == bool(value.get("slices")):
        raise UserError("give either models or slices, a list with at least one entry.")
    if value.get("models"):
        sources = [_source(s, f"models[{i}]", method, False) for i, s in enumerate(_list(value["models"], "models"))]
        if base and base not in [s.model for s in sources]:
            sources.append(Source(base))
        slices = [Slice(tuple(sources))]
    else:
        slices = [_slice(s, f"slices[{i}]", method) for i, s in enumerate(_list(value["slices"], "slices"))]
    for each in slices:
        _check_sources([s.model for s in each.sources], base, method)
    dtypes = [_dtype(value[key], key) for key in ("out_dtype", "dtype") if value.get(key) is not None]
    shared = read_parameters(value.get("parameters"), "parameters", method, shared=True, each=True)
    source = value.get("tokenizer_source")
    source = _name(source, "tokenizer_source") if source is not None else None
    config = Config(method, tuple(slices), base, shared, dtypes[0] if dtypes else None, source, text)
    for each in config.slices:
        _check_required(config, each)
    return config


def resolve(config: Config, part: Slice, name: str, t: float, inputs: Mapping[str, str]) -> dict:
    """The parameters of one tensor, as `methods.merging.merge_tensor` takes them.

    name: of the tensor written; t: its place in the slice, 0 to 1; inputs: {model: name of the tensor there}, in order.
    The order of precedence is mergekit's: the model's own setting, the slice's, the config's, the default.
    """
    method = METHODS[config.method]
    found = {
        key: _first([part.parameters, config.parameters], key, name, t, default)
        for key, default in method.shared.items()
        if key != "int8_mask"  # mergekit's way to save memory, without effect on the result
    }
    others = {model: tensor for model, tensor in inputs.items() if model != config.base or not method.base}
    own = {source.model: source.parameters for source in part.sources}
    for key, default in method.each.items():
        found[key] = [
            _first([own[model], part.parameters, config.parameters], key, tensor, t, default)
            for model, tensor in others.items()
        ]
    return found


def _first(scopes: list[Mapping], key: str, name: str, t: float, default):
    for scope in scopes:
        if key in scope and (value := evaluate(scope[key], name, t, key in SWITCHES)) is not None:
            return value
    if default is REQUIRED:
        raise UserError(f"no {key} for {name}: none of its filters fits that name; add an entry without a filter.")
    return default


_WHY_BASE = {
    "task": "the model that all of them were fine-tuned from, whose weights are subtracted.",
    "slerp": "the model at t = 0, one of the two.",
}


def _slice(value, place: str, method: str) -> Slice:
    if not isinstance(value, Mapping):
        raise UserError(f"{place} is {value!r}: expected sources, a list of model and layer_range.")
    known(value, ("sources", "parameters"), place, {"base_model": "base_model of the whole config"})
    sources = _list(value.get("sources"), f"{place}.sources")
    found = tuple(_source(s, f"{place}.sources[{i}]", method, True) for i, s in enumerate(sources))
    lengths = {source.layers[1] - source.layers[0] for source in found}
    if len(lengths) > 1:
        raise UserError(f"{place}: its layer ranges have {sorted(lengths)} layers; all sources need the same number.")
    return Slice(found, read_parameters(value.get("parameters"), f"{place}.parameters", method, shared=True, each=True))


def _source(value, place: str, method: str, ranged: bool) -> Source:
    if not isinstance(value, Mapping):
        raise UserError(f"{place} is {value!r}: expected `model: NAME`, with its parameters below.")
    known(value, ("model", "parameters", *(["layer_range"] if ranged else [])), place, {})
    parameters = read_parameters(value.get("parameters"), f"{place}.parameters", method, shared=False, each=True)
    layers = None
    if ranged:
        layers = value.get("layer_range")
        whole = isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
        if not whole or not 0 <= layers[0] < layers[1]:
            raise UserError(f"{place}.layer_range is {layers!r}: expected [first, last + 1], such as [0, 12].")
        layers = tuple(layers)
    return Source(_name(value.get("model"), f"{place}.model"), layers, parameters)


def _check_sources(models: list[str], base: str | None, method: str) -> None:
    needs = METHODS[method]
    if twice := [model for model in models if models.count(model) > 1]:
        raise UserError(f"{twice[0]} is listed twice: list each model once, with the sum of its weights.")
    if needs.base and base not in models:
        raise UserError(f"a slice does not list the base model {base}: add it to the sources of every slice.")
    if needs.models and len(models) != needs.models:
        raise UserError(f"{method} merges exactly {needs.models} models, the base included; {len(models)} are listed.")
    if needs.base and len(models) < 2:
        raise UserError(f"{method} needs at least one model beside the base {base}.")


def _check_required(config: Config, part: Slice) -> None:
    """Every required parameter is set somewhere."""
    method = METHODS[config.method]
    for key in (key for key, default in method.shared.items() if default is REQUIRED):
        if key not in part.parameters and key not in config.parameters:
            raise UserError(f"{config.method} needs parameters.{key}: a number, or a list from first to last layer.")
    for source in part.sources:
        if method.base and source.model == config.base:
            if source.parameters:
                raise UserError(f"{source.model} is the base model of {config.method}, so it takes no parameters.")
            continue
        for key in (key for key, default in method.each.items() if default is REQUIRED):
            if not any(key in scope for scope in (source.parameters, part.parameters, config.parameters)):
                raise UserError(f"{source.model} has no {key}: give it one, or set parameters.{key} for all models.")


def _list(value, place: str) -> list:
    if not isinstance(value, list) or not value:
        raise UserError(f"{place} is {value!r}: expected a list with at least one entry.")
    return value


def _name(value, place: str) -> str:
    if isinstance(value, Mapping):  # mergekit's long form, {model: {path: ...}}
        raise UserError(f"{place} is {value!r}: give the model as one text, such as runs/extract or BASE+ADAPTER.")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place} is {value!r}: expected the name or the folder of a model.")
    return value.strip()


def _dtype(value, place: str) -> torch.dtype:
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{place} is {value!r}: choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]
