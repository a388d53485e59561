"""Bench `merge`: `finetune-lab merge` against mergekit and against a plain copy, on the same shards.

Three random bf16 models of about 1 GB each, a base and two noisy copies of it, in files of 500 MB. One run of ours is
`lab.merging.merge`, one of mergekit is `run_merge`: reading the config, planning, reading, merging, writing. The copy
reads the same bytes with `readinto` and writes as many as the merge, without arithmetic. All three flush to the disk,
as far as they do so themselves (mergekit does not).

GB/s is input bytes over CPU seconds of this process, so it is the rate of one core; files are in the page cache.
Memory is the peak of resident pages above what was resident before (Linux only), pages of mapped files included.
"""

import ctypes
import gc
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

from finetune_lab.errors import UserError
from finetune_lab.lab import merging, models
from finetune_lab.lab.merging import write
from finetune_lab.lab.merging.layout import Planned
from finetune_lab.lab.meter import median_ratio, one_thread

NAME = "merge"
HELP = "finetune-lab merge against mergekit and a plain copy: GB/s of a core, peak memory, equal results"

FULL = {"hidden": 2048, "inner": 5632, "layers": 10, "vocab": 32_000, "shard": 500_000_000, "rounds": 3,
        "goals": {"rate": ">= 2", "sparse": ">= 8", "family": ">= 2", "copy": "<= 1.5"}}  # fmt: skip
QUICK = {"hidden": 384, "inner": 1024, "layers": 4, "vocab": 8_000, "shard": 10_000_000, "rounds": 3,
         "goals": {"rate": ">= 0.5", "sparse": ">= 3", "family": ">= 1.2", "copy": "<= 4"}}  # fmt: skip
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
SPARSE = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}  # densities
SLOW = ("ties", "dare_ties", "dare_linear")  # one round: mergekit takes minutes
POOL = 2**22  # random numbers that every tensor is cut from
AGREE = 2**-7  # one unit in the last place of bf16, over the value: both round, ours once


def row(name: str, value: float, unit: str, peer: str | None = None, peer_value: float | None = None,
        ratio: float | None = None, goal: str | None = None) -> dict:  # fmt: skip
    return {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": ratio,
            "goal": goal}  # fmt: skip


def make_models(place: Path, size: dict) -> list[Path]:
    """Folders `base`, `a`, `b`: Llama-shaped bf16 models in shards; a and b are the base and 1 % of noise."""
    h, inner, kv = size["hidden"], size["inner"], size["hidden"] // 4
    shapes = {"model.embed_tokens.weight": (size["vocab"], h), "model.norm.weight": (h,)}
    for i in range(size["layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{n}layernorm.weight": (h,) for n in ("input_", "post_attention_")}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": s for n, s in
                   {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}.items()}  # fmt: skip
        shapes |= {f"{layer}mlp.{n}_proj.weight": s for n, s in
                   {"gate": (inner, h), "up": (inner, h), "down": (h, inner)}.items()}  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h, "intermediate_size": inner,
        "num_hidden_layers": size["layers"], "num_attention_heads": h // 64, "num_key_value_heads": kv // 64,
        "vocab_size": size["vocab"], "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    planned = [Planned(name, shape, torch.bfloat16, {}, {}) for name, shape in shapes.items()]
    pool = (0.02 * torch.randn(POOL, generator=torch.Generator().manual_seed(0))).repeat(2)
    folders = []
    for k, name in enumerate(("base", "a", "b")):
        folder = place / name
        folder.mkdir()
        files = write.shards(planned, size["shard"])
        for file, tensors in files.items():
            write.write_shard(folder / file, tensors, (_noisy(pool, planned.index(t), t.shape, k) for t in tensors))
        write.write_index(folder, files)
        write.write_text(folder / "config.json", json.dumps(config))
        write.carry(models.tiny_folder(), folder, write.CARRIED)
        folders.append(folder)
    return folders


def _noisy(pool: torch.Tensor, number: int, shape: tuple[int, ...], k: int) -> torch.Tensor:
    """The numbers of one tensor: a stretch of the pool, and for k > 0 1 % of another stretch."""
    n = torch.Size(shape).numel()

    def stretch(start: int) -> torch.Tensor:
        return pool[start % POOL :][: min(n, POOL)]

    fill = stretch(977 * number)
    fill = fill + 0.01 * stretch(31 * number + 1_000_003 * k) if k else fill
    return fill.bfloat16().repeat(-(-n // POOL))[:n].view(shape)


def recipe(method: str, base: Path, a: Path, b: Path) -> dict:
    """The config of one method; linear and SLERP merge two models, the others two on their base."""
    own = {"weight": 0.5} | ({"density": SPARSE[method]} if method in SPARSE else {})
    if method == "slerp":
        return {"merge_method": "slerp", "base_model": str(a), "models": [{"model": str(a)}, {"model": str(b)}],
                "parameters": {"t": 0.3}, "dtype": "bfloat16"}  # fmt: skip
    listed = [{"model": str(m), "parameters": own} for m in (a, b)]
    return {"merge_method": method, "models": listed, "dtype": "bfloat16"} | (
        {} if method == "linear" else {"base_model": str(base)}
    )


def copy(plan: merging.Plan, out: Path) -> None:
    """Read the bytes that a merge reads and write as many as it writes: 1 MiB at a time, flushed at the end."""
    left, buffer = plan.bytes_written, memoryview(bytearray(2**20))
    with out.open("wb", buffering=0) as target:
        for path in sorted({stored.file for model in plan.models.values() for stored in model.tensors.values()}):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    left -= target.write(buffer[: min(count, left)]) if left else 0
        os.fsync(target.fileno())


def mergekit_run(config: dict, out: Path) -> None:
    """mergekit's own merge of the same config, quiet, with its defaults."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True, random_seed=0))


def measured(fn: Callable[[], object]) -> tuple[float, int | None]:
    """(CPU seconds, peak of resident bytes above those before) of one call."""
    gc.collect()
    before = _resident(reset=True)
    start = time.process_time()
    fn()
    seconds = time.process_time() - start
    return seconds, None if before is None else _resident("VmHWM") - before


def _resident(field: str = "VmRSS", reset: bool = False) -> int | None:
    """Resident bytes of this process now (VmRSS) or at most since the reset (VmHWM); None where /proc has none."""
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except (OSError, AttributeError):
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def compare(method: str, folders: list[Path], place: Path, size: dict) -> list[dict]:
    """Rows of one method: rate against mergekit and the copy, peak memory, and whether the results agree."""
    config = recipe(method, *folders)
    plan = merging.plan(config)
    outs = {name: place / name for name in ("ours", "mergekit", "copy")}
    runs = {
        "copy": lambda: copy(plan, outs["copy"]),
        "ours": lambda: merging.merge(config, outs["ours"], shard_bytes=size["shard"], progress=False),
        "mergekit": lambda: mergekit_run(config, outs["mergekit"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[int | None]] = {name: [] for name in runs}
    for _ in range(1 if method in SLOW else size["rounds"]):
        for name, fn in runs.items():
            _remove(outs[name])
            spent, peak = measured(fn)
            seconds[name].append(spent)
            peaks[name].append(peak)
    rows = _rates(method, plan, seconds, size["goals"]) + _memory(method, plan, peaks)
    if "dare" not in method:  # random choices differ
        rows.append(row(f"{method}: largest difference to mergekit over the value, tensors of the first shard",
                        _difference(outs["ours"], outs["mergekit"]), "share", goal=_agree(method)))  # fmt: skip
    for out in outs.values():
        _remove(out)
    return rows


def _rates(method: str, plan: merging.Plan, seconds: dict, goals: dict) -> list[dict]:
    rate = {name: plan.bytes_read / median(times) / 1e9 for name, times in seconds.items()}
    faster = median_ratio(seconds, "mergekit", "ours")
    peer = f"mergekit {metadata.version('mergekit')}"
    rows = [row(f"{method}: times faster than mergekit", rate["ours"], "GB/s", peer, rate["mergekit"], faster,
                goals["sparse" if method in SPARSE else "family"])]  # fmt: skip
    if method not in SPARSE:
        rows.append(row(f"{method}: input bytes over CPU seconds", rate["ours"], "GB/s", goal=goals["rate"]))
    rows.append(row(f"{method}: CPU time over that of a plain copy", rate["ours"], "GB/s", "copy", rate["copy"],
                    median_ratio(seconds, "ours", "copy"), goals["copy"] if method == "linear" else None))  # fmt: skip
    return rows


def _memory(method: str, plan: merging.Plan, peaks: dict) -> list[dict]:
    if None in peaks["ours"]:
        return []
    largest = max(planned.nbytes for planned in plan.tensors)
    limit = largest * len(plan.models) * 3
    ours, theirs = (max(peaks[name]) / 1e6 for name in ("ours", "mergekit"))
    return [
        row(f"{method}: peak memory over largest tensor x models x 3", ours, "MB", "the limit", limit / 1e6,
            ours * 1e6 / limit, "<= 1"),
        row(f"{method}: peak memory over mergekit's", ours, "MB", "mergekit", theirs, ours / theirs),
    ]  # fmt: skip


def _agree(method: str) -> str | None:
    """The linear family rounds once in both; TIES trims bf16 differences in mergekit, which are coarse."""
    return f"<= {AGREE:g}" if method in ("linear", "slerp") else None


def _difference(ours: Path, theirs: Path) -> float:
    """Largest difference of the result over the largest entry of the same tensor, in the first shard."""
    from safetensors import safe_open

    mine = min(ours.glob("*.safetensors"))
    largest = 0.0
    with safe_open(mine, "pt") as one:
        for path in sorted(theirs.glob("*.safetensors")):
            with safe_open(path, "pt") as other:
                for name in set(one.keys()) & set(other.keys()):
                    x, y = one.get_tensor(name).float(), other.get_tensor(name).float()
                    largest = max(largest, float((x - y).abs().max() / y.abs().max()))
    return largest


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@one_thread()
def run(quick: bool) -> list[dict]:
    """All rows; `quick` takes models of some 30 MB, and lower goals."""
    try:
        import mergekit.merge  # noqa: F401  (its import takes seconds: not part of what is measured)
    except ImportError:
        raise UserError("this bench needs mergekit: install the package's dev extra.") from None
    logging.getLogger("mergekit").setLevel(logging.ERROR)
    size, rows = QUICK if quick else FULL, []
    needed = 0 if quick else 6_000_000_000
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        raise UserError(
            f"this bench writes {needed / 1e9:.0f} GB to {tempfile.gettempdir()}: make room, or use --quick."
        )
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(action="ignore"):
        folders = make_models(Path(place), size)
        plan = merging.plan(recipe("linear", *folders))
        rows.append(row("bytes of one model", plan.bytes_written / 1e9, "GB"))
        for _ in range(2):  # a virtual machine is slow the first time that it touches a page
            copy(plan, Path(place) / "warm")
            _remove(Path(place) / "warm")
            merging.merge(recipe("linear", *folders), Path(place) / "warm", progress=False)
            _remove(Path(place) / "warm")
        for method in METHODS:
            rows += compare(method, folders, Path(place), size)
    return rows
