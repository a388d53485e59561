"""Save and load adapters in peft's own format: `adapter_config.json` and `adapter_model.safetensors`.

What `save_adapter` writes loads in `peft.PeftModel.from_pretrained`, and `load_adapter` reads what peft saves: LoRA,
rsLoRA and DoRA on linear layers, tied heads and ranks that differ from layer to layer included. Everything is checked
before the model is touched. The file also carries a few numbers that tell the base it was trained on; peft ignores
them, and so it loads an adapter on a wrong base of the same shapes in silence.
Leaves out: adapters of embeddings, trained biases, `modules_to_save` and the rest of the family (each is refused).
In production: `peft.PeftModel.save_pretrained` and `from_pretrained`.
"""

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune_lab.errors import UserError
from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.inject import active_adapter, adapters, add_adapter, find_targets
from finetune_lab.methods.lora import LoRALinear, dense_weight, features, lora_scaling, rslora_scaling

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # how peft names the model inside its wrapper
KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|base_layer)(?:\.weight)?")
OURS = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude"}
BASE = "base_fingerprint"
# options of LoraConfig that change what an adapter computes, and that these layers do not have
REFUSED = ("modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
           "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
           "monteclora_config")  # fmt: skip


def save_adapter(model: nn.Module, folder: str | Path, adapter: str | None = None) -> Path:
    """Write one adapter, the active one unless named, in peft's format; returns the folder.

    Raises UserError when there is none of that name, or its layers differ in what the format holds once.
    """
    name = adapter or active_adapter(model)
    layers = adapters(model).get(name)
    if layers is None:
        missing = "no adapter is active" if adapter is None else f"no adapter {adapter!r}"
        raise UserError(f"{missing}; the model has: {', '.join(adapters(model)) or 'none'}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.B
        if isinstance(layer, DoRALinear):
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = layer.magnitude
    base = {path: [round(x, 4) for x in fingerprint(layer.base_weight)] for path, layer in layers.items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:  # a kill leaves the older adapter whole
        _config(model, layers).save_pretrained(part)
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
            Path(part) / WEIGHTS,
            metadata={"format": "pt", BASE: json.dumps(base)},
        )
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(part) / name, folder / name)
    return folder


def load_adapter(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Add the adapter kept in `folder` to `model`, in place, and make it the active one; returns the model.

    Raises UserError, one sentence, for a folder that is no LoRA adapter, a base that it does not fit, a rank or shape
    that contradicts its config, and options that these layers do not have; the model is then as it was.
    """
    layers = adapter_layers(Path(folder), lambda path: _base_layer(model, path, Path(folder)))
    try:
        return add_adapter(model, adapter, layers)
    except ValueError as error:
        raise UserError(str(error)) from error


def adapter_layers(folder: Path, find: Callable[[str], nn.Module]) -> dict[str, LoRALinear]:
    """The layers of the adapter kept in `folder`, each on the linear layer that `find(path)` returns, checked.

    Raises UserError as `load_adapter` does.
    """
    config, tensors, base = _read(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise UserError(f"{folder}: tensor {key} is no part of a LoRA on a linear layer: load it with peft")
        parts.setdefault(match[1], {})[match[2]] = tensor
    modules = {path: find(path) for path in parts}
    patterns = {"r": config["rank_pattern"], "lora_alpha": config["alpha_pattern"]}
    sizes = {
        path: [pattern.get(get_pattern_key(pattern, path), config[name]) for name, pattern in patterns.items()]
        for path in parts
    }
    for path, part in parts.items():
        _check_shapes(path, part, sizes[path][0], modules[path], config["use_dora"], folder)
        _check_base_layer(path, part, modules[path], folder)
    _check_base(modules, base, folder)
    scale = rslora_scaling if config["use_rslora"] else lora_scaling
    kind = DoRALinear if config["use_dora"] else LoRALinear
    layers = {}
    for path, part in parts.items():
        layer = layers[path] = kind(modules[path], *sizes[path], config["lora_dropout"], scale=scale)
        with torch.no_grad():
            for tensor, parameter in ((part[t], getattr(layer, p)) for t, p in OURS.items() if t in part):
                parameter.copy_(tensor.reshape(parameter.shape))
    return layers


def fingerprint(weight: Tensor, numbers: int = 4) -> list[float]:
    """Sums of the weight's first 65,536 entries with fixed random signs, over their norm.

    bf16 or 4-bit storage of the same weight moves these numbers by 0.1 at most; another weight has others, about 1.
    """
    entries = weight.detach().flatten()[: 2**16].float().cpu()
    signs = torch.randint(0, 2, (numbers, len(entries)), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return (signs @ entries / entries.norm().clamp(min=1e-30)).tolist()


def _config(model: nn.Module, layers: dict[str, LoRALinear]) -> LoraConfig:
    """peft's description of these layers: the most frequent rank and alpha, and patterns for the others."""
    one = {
        (isinstance(layer, DoRALinear), layer.scale, layer.dropout.p, hasattr(layer.base, "nf"))
        for layer in layers.values()
    }
    if len(one) > 1:
        raise UserError("the adapter mixes kinds of layers (LoRA and DoRA, scalings, dropouts): peft's file holds one")
    dora, scale, dropout, transposed = next(iter(one))
    if scale not in (lora_scaling, rslora_scaling):
        raise UserError(f"scaling {scale.__name__} has no name in peft: use lora_scaling or rslora_scaling")
    r, alpha = (Counter(getattr(layer, of) for layer in layers.values()).most_common(1)[0][0] for of in ("r", "alpha"))
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(path)}": layer.r for path, layer in layers.items() if layer.r != r},
        alpha_pattern={f"^{re.escape(path)}": layer.alpha for path, layer in layers.items() if layer.alpha != alpha},
        lora_dropout=dropout,
        target_modules=_short_names(model, list(layers)),
        use_rslora=scale is rslora_scaling,
        use_dora=dora,
        fan_in_fan_out=transposed,
        base_model_name_or_path=getattr(getattr(model, "config", None), "name_or_path", None) or None,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        inference_mode=True,
    )


def _short_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Last names of the paths if they name just these layers, else the whole paths."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    return short if set(find_targets(model, short)) == set(paths) else paths


def _read(folder: Path) -> tuple[dict, dict[str, Tensor], dict | None]:
    """Config with its defaults filled in, tensors, and the base's fingerprint if the file has one."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not an adapter in safetensors: it has no {name}")
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            base = json.loads((file.metadata() or {}).get(BASE, "null"))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{folder} could not be read as an adapter: {str(error).splitlines()[0]}") from error
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a {raw.get('peft_type')} adapter: only LoRA, rsLoRA and DoRA load here, use peft")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{folder} trained biases too (bias={raw['bias']!r}): load it with peft")
    if used := [option for option in REFUSED if raw.get(option)]:
        raise UserError(f"{folder} uses {used[0]}, which these layers do not have: load it with peft")
    usual = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
             "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
    return {key: raw.get(key, default) for key, default in usual.items()}, tensors, base


def _base_layer(model: nn.Module, path: str, folder: Path) -> nn.Module:
    try:
        module = model.get_submodule(path)
        module = module.base if isinstance(module, LoRALinear) else module
        features(module)
    except (AttributeError, ValueError) as error:
        raise UserError(
            f"{folder} was made for another model: it adapts {path}, and this {type(model).__name__} has no such "
            "linear layer"
        ) from error
    return module


def _check_shapes(path: str, part: dict, r: int, module: nn.Module, dora: bool, folder: Path) -> None:
    fan_in, fan_out = features(module)
    wanted = {"lora_A": (r, fan_in), "lora_B": (fan_out, r)} | ({"lora_magnitude_vector": (fan_out,)} if dora else {})
    if lost := [name for name in wanted if name not in part]:
        raise UserError(f"{folder} is incomplete: {path} has no {lost[0]}")
    if not dora and "lora_magnitude_vector" in part:
        raise UserError(f"{folder} holds DoRA magnitudes but its config says use_dora=false: correct the config")
    for name, shape in wanted.items():
        got = tuple(part[name].shape)
        rank = {"lora_A": got[0], "lora_B": got[-1]}.get(name, r)
        if rank != r:
            raise UserError(
                f"{folder}: {path}.{name} has rank {rank} but {CONFIG} says {r}: the two do not belong together"
            )
        if part[name].numel() != fan_out if name == "lora_magnitude_vector" else got != shape:
            raise UserError(
                f"{folder} was made for another base: {path}.{name} is {got}, this model's layer needs {shape}"
            )


def _check_base_layer(path: str, part: dict, module: nn.Module, folder: Path) -> None:
    """peft keeps the frozen weight of an adapted head or embedding in the file: it must be the model's own."""
    if "base_layer" not in part:
        return
    theirs, ours = part["base_layer"], dense_weight(module)
    theirs = theirs.T if hasattr(module, "nf") else theirs
    if theirs.shape != ours.shape or (theirs.to(ours).float() - ours.float()).norm() > 0.01 * ours.float().norm():
        raise UserError(
            f"{folder} brings its own weights of {path}, and they are not this model's: load the base that it was "
            "trained on, or load it with peft"
        )


def _check_base(modules: dict[str, nn.Module], base: dict | None, folder: Path) -> None:
    """Compare the fingerprints kept by `save_adapter`; a file that peft wrote has none."""
    if not base or not set(modules) <= set(base):
        return
    now = torch.tensor([fingerprint(dense_weight(module)) for module in modules.values()])
    distance = (now - torch.tensor([base[path] for path in modules])).square().mean().sqrt()
    if distance > 0.3:
        raise UserError(
            f"{folder} was trained on another base: the shapes fit, but the frozen weights are others "
            f"(distance {distance:.2f}, same base at most 0.1). Load the base that it was trained on"
        )
