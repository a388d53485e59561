"""Carry out a merge: read, merge and write one tensor after the other.

    report = merge("recipe.yml", "merged/both")

Memory holds one output tensor and the pages of its inputs that are in use, whatever the size of the models.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from finetune_lab.errors import UserError
from finetune_lab.lab.merging import checks, write
from finetune_lab.lab.merging.card import card, provenance_of
from finetune_lab.lab.merging.config import load
from finetune_lab.lab.merging.layout import Plan, Planned, make_plan
from finetune_lab.lab.merging.parameters import METHODS
from finetune_lab.methods.merging import merge_tensor

ENTRYWISE = ("linear", "task_arithmetic", "dare_linear", "dare_ties")  # the others look at a whole tensor first
PIECE = 2**20  # entries
SHARD_BYTES = 5_000_000_000  # as in transformers and mergekit


def plan(config: str | Path | Mapping) -> Plan:
    """Read the recipe (a YAML file, or a dict of its content) and check everything; writes nothing. Raises UserError."""
    return make_plan(load(config))


def merge(
    config: str | Path | Mapping,
    out: str | Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> dict:
    """Merge as the recipe says into the new folder `out`, and return what `describe` says and the bill.

    seed: of DARE's random choices; each tensor draws from its own generator, so the result does not depend on the
    order of tensors. shard_bytes: the largest file. Raises UserError, and then leaves nothing.
    """
    write.check_free(Path(out).expanduser())
    return carry_out(plan(config), out, seed=seed, shard_bytes=shard_bytes, progress=progress)


def carry_out(
    checked: Plan, out: str | Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES, progress: bool = True
) -> dict:
    """`merge` for a plan that is checked already."""
    out = Path(out).expanduser()
    checks.room_on_disk(out, checked.bytes_written)
    wall, cpu = time.perf_counter(), time.process_time()
    bar = tqdm(
        total=checked.bytes_read, desc="merging", unit="B", unit_scale=True, file=sys.stderr, disable=not progress
    )
    with write.appearing(out) as folder, bar:
        files = write.shards(checked.tensors, shard_bytes)
        method = checked.config.method
        largest = max(_piece(method, torch.Size(t.shape).numel()) * t.dtype.itemsize for t in checked.tensors)
        buffer = torch.empty(largest, dtype=torch.uint8)
        for name, tensors in files.items():
            write.write_shard(folder / name, tensors, _values(checked, tensors, seed, buffer, bar))
        write.write_index(folder, files)
        _write_beside(checked, folder, out.name, seed)
    bill = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return describe(checked) | {"out": str(out), "seed": seed, "files": list(files)} | bill


def describe(checked: Plan) -> dict:
    """A plan as plain values."""
    return {
        "merge_method": checked.config.method,
        "models": [
            {
                "model": model.name, "base": model.name == checked.config.base, "adapter": model.adapter_folder is not None,
                "bytes": model.bytes, "from": provenance_of(model),
            }
            for model in checked.models.values()
        ],
        "tensors": len(checked.tensors), "layers": len(checked.layers), "dtype": _dtype(checked),
        "parameters": sum(torch.Size(t.shape).numel() for t in checked.tensors),
        "bytes_read": checked.bytes_read, "bytes_written": checked.bytes_written, "warnings": checked.warnings,
    }  # fmt: skip


def _values(checked: Plan, tensors: list[Planned], seed: int, buffer: Tensor, bar: tqdm) -> Iterator[Tensor]:
    """The merged tensors in order, in pieces that share one memory: use one before you take the next."""
    for planned in tensors:
        yield from _merged(checked, planned, seed, buffer)
        bar.update(sum(checked.models[model].tensors[name].nbytes for model, name in planned.inputs.items()))


def _merged(checked: Plan, planned: Planned, seed: int, buffer: Tensor) -> Iterator[Tensor]:
    """One tensor: whole, or flat pieces that are written while they are still in the processor's cache."""
    config = checked.config
    inputs = {model: checked.models[model].read(name) for model, name in planned.inputs.items()}
    if not planned.dtype.is_floating_point:
        yield next(iter(inputs.values()))
        return
    base = inputs.pop(config.base).reshape(-1) if METHODS[config.method].base else None
    others = [tensor.reshape(-1) for tensor in inputs.values()]
    generator = torch.Generator().manual_seed(seed_of(seed, planned.name))
    size = _piece(config.method, len(others[0]))
    for i in range(0, len(others[0]), size):
        piece = slice(i, i + size)
        models = [tensor[piece] for tensor in others]
        out = buffer[: len(models[0]) * planned.dtype.itemsize].view(planned.dtype)
        try:
            yield merge_tensor(
                config.method, base if base is None else base[piece], models, planned.parameters, out, generator
            )
        except ValueError as error:
            raise UserError(f"{planned.name}: {error}.") from error


def _piece(method: str, entries: int) -> int:
    """Entries that are merged at once: a piece where no entry depends on others, else the whole tensor."""
    return max(1, min(PIECE, entries) if method in ENTRYWISE else entries)


def seed_of(seed: int, name: str) -> int:
    """A seed for one tensor: the same for the same seed and name, on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") % 2**63


def _write_beside(checked: Plan, folder: Path, name: str, seed: int) -> None:
    """config.json, generation_config.json, tokenizer, recipe and card."""
    donor = checked.donor
    settings = {k: v for k, v in donor.config.items() if k not in ("torch_dtype", "_name_or_path", "dtype")}
    count = settings.get("num_hidden_layers")
    if checked.layers != list(range(count or len(checked.layers))):
        settings = {  # such as layer_types: one entry a layer
            k: [v[i] for i in checked.layers] if isinstance(v, list) and len(v) == count else v
            for k, v in settings.items()
        } | {"num_hidden_layers": len(checked.layers)}  # fmt: skip
    settings["dtype"] = _dtype(checked)
    write.write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    write.carry(donor.folder, folder, ["generation_config.json", "LICENSE*"])
    write.carry(checked.tokenizer.folder, folder, write.CARRIED)
    write.write_text(folder / "merge.yml", checked.config.text.rstrip() + "\n")
    write.write_text(folder / "README.md", card(checked, name, seed))


def _dtype(checked: Plan) -> str:
    """The dtype of most of the bytes that are written."""
    sizes: dict[torch.dtype, int] = {}
    for planned in checked.tensors:
        sizes[planned.dtype] = sizes.get(planned.dtype, 0) + planned.nbytes
    return str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.")
