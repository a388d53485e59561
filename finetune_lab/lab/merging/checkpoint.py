"""A model on disk as a table of tensors, each read on its own: what a merge needs instead of a loaded model.

    source = open_model("runs/extract")           # a folder, a known name, a run, an adapter, or BASE+ADAPTER
    source.tensors["model.norm.weight"].shape     # known from the headers, nothing is read
    source.read("model.norm.weight")              # a memory map of the file, or base + scaling * B A for an adapter

safetensors files start with 8 bytes (the length of the header) and the header itself: JSON with dtype, shape and place
of each tensor. A tensor is mapped, not read: its pages come when they are used and go when the tensor goes, so a merge
holds a few tensors whatever the model's size. In production: `safetensors.safe_open`, whose map keeps every page that
was touched until the file is closed.
"""

import difflib
import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune_lab.errors import UserError
from finetune_lab.lab import hub, models
from finetune_lab.methods.lora import LoRALinear

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: `nbytes` bytes from `start` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def map(self) -> Tensor:
        """The tensor as a private memory map: nothing is read yet, and writing to it never reaches the file."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        begin = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            pages = mmap.mmap(file.fileno(), self.start + self.nbytes - begin, access=mmap.ACCESS_COPY, offset=begin)
        count = self.nbytes // self.dtype.itemsize
        return torch.frombuffer(pages, dtype=self.dtype, count=count, offset=self.start - begin).view(self.shape)


@dataclass
class Checkpoint:
    """One model of a merge. on: the name of the model that an adapter changes; adapter: its layers by weight."""

    name: str
    folder: Path
    config: dict
    tensors: dict[str, Stored]
    on: str | None = None
    adapter_folder: Path | None = None
    adapter: dict[str, LoRALinear] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """One tensor: a memory map, or for an adapted weight base + scaling * B A in fp32 (DoRA: its own formula)."""
        stored = self.tensors[name].map()
        if name not in self.adapter:
            return stored
        layer = self.adapter[name]
        with holding(layer, stored.float()), torch.no_grad():
            return layer.adapted_weight()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the model, those of the adapter included."""
        own = sum(p.nbytes for layer in self.adapter.values() for p in layer.parameters(recurse=False))
        return own + sum(stored.nbytes for stored in self.tensors.values())


@contextmanager
def holding(layer: LoRALinear, weight: Tensor) -> Iterator[None]:
    """The layer's base has this weight (out, in) within the block, and none outside: the map can go."""
    layer.base.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        layer.base.weight = nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False)


def open_model(name: str) -> Checkpoint:
    """Find a model and read its headers. Raises UserError, one sentence, for what cannot be merged."""
    for part in [name] if Path(name).expanduser().exists() else name.split("+"):
        _exists(part)
    base, adapter = _places(name)
    _exists(base)
    folder = models.locate(base)
    models.check_folder(folder, base)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise UserError(
            f"{name} is stored quantised, and a merge of rounded weights loses the differences: give the full-precision "
            "model."
        )
    index = folder / "model.safetensors.index.json"
    files = sorted(hub.shards(index)) if index.is_file() else ["model.safetensors"]
    tensors: dict[str, Stored] = {}
    for file in files:
        tensors |= read_header(folder / file)
    source = Checkpoint(name, folder, config, tensors)
    if adapter is not None:
        source.on, source.adapter_folder = base, adapter
        source.adapter = _adapter(adapter, source)
    return source


def read_header(path: Path) -> dict[str, Stored]:
    """Where each tensor of a safetensors file lies. Raises UserError for a file that is broken or cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise UserError(f"{path} is not a safetensors file, or it is cut off: fetch it again.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} has a broken safetensors header: fetch it again.") from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {name} has dtype {entry['dtype']}, which cannot be merged: give a 16 or 32-bit model."
            )
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if end - begin != torch.Size(shape).numel() * dtype.itemsize or 8 + length + end > size:
            raise UserError(f"{path} is cut off or broken at {name}: fetch it again.")
        found[name] = Stored(path, dtype, shape, 8 + length + begin, end - begin)
    return found


def _exists(name: str) -> None:
    """Raise UserError for the path of a folder that is not there: it would be looked for on the hub instead."""
    folder = Path(name).expanduser()
    if not folder.exists() and (
        name.startswith(("./", "../", "/", "~"))
        or folder.parts[:1] in (("runs",), ("merged",))
        or (len(folder.parts) > 1 and folder.parent.is_dir())
    ):
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, 1)
        meant = f"did you mean {folder.parent / near[0]}?" if near else "paths count from the folder you are in."
        raise UserError(f"There is no folder {name}; {meant}")


def _places(name: str) -> tuple[str, Path | None]:
    """(name of the model, folder of the adapter or None)."""
    if "+" in name and not Path(name).expanduser().exists():
        base, _, adapter = name.partition("+")
        return base, _find_adapter(adapter)
    folder = Path(name).expanduser()
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model"), None
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
            adapter = _find_adapter(name)
            return _base_of(adapter), adapter
    if (folder / "run.json").is_file():
        raise UserError(f"{name} is a run without a result: finish it with `finetune-lab sft`.")
    return name, None


def _find_adapter(name: str) -> Path:
    from finetune_lab.lab.finetune.talk import find_adapter  # peft is slow to import, and most merges need none

    return find_adapter(name)


def _base_of(adapter: Path) -> str:
    from finetune_lab.lab.finetune.talk import base_of

    return base_of(adapter)


def _adapter(folder: Path, source: Checkpoint) -> dict[str, LoRALinear]:
    """The adapter's layers by the name of the weight that each changes; the base's weights are not kept."""
    from finetune_lab.lab.adapters import adapter_layers

    if json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("fan_in_fan_out"):
        raise UserError(
            f"{source.name} adapts weights that are stored transposed: merge it into its base with peft first."
        )

    def find(path: str) -> nn.Module:
        stored = source.tensors.get(f"{path}.weight")
        if stored is None or len(stored.shape) != 2:
            what = "ties that layer to its embedding" if path.endswith("lm_head") else "has no such linear layer"
            raise UserError(
                f"{source.name} adapts {path}, and its base {what}: merge it into its base with peft first."
            )
        linear = nn.Linear(stored.shape[1], stored.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(stored.map(), requires_grad=False)
        return linear

    layers = {f"{path}.weight": layer for path, layer in adapter_layers(folder, find).items()}
    for layer in layers.values():
        with holding(layer, layer.base.weight):
            pass
    return layers
