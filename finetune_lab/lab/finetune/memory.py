"""Will it fit? The estimate of `methods.memory` for a recipe, next to what this machine has free."""

import json
import math
import os
from pathlib import Path

import psutil
import torch

from finetune_lab.lab.finetune.recipe import Recipe
from finetune_lab.lab.finetune.silent import Finding
from finetune_lab.methods import memory

OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_8bit": "adamw-8bit", "paged_adamw_8bit": "paged-adamw-8bit",
    "adafactor": "adafactor",
}  # fmt: skip


def estimated(recipe: Recipe, folder: Path, longest: int, cuda: bool, objective: str) -> dict | None:
    """{"bytes", "moment", "parts"} at the peak of a step, for one process; None for an architecture we do not know.

    recipe: completed; folder: of the model; longest: tokens of the longest sequence, as the worst batch has only such.
    TRL's fused head works through the logits in pieces, so they count as chunked. objective: "sft", "dpo", or
    "kto", which counts as half as many pairs (its shifted answers run without gradient).
    """
    reference = (
        {"live": "adapter-off", "precomputed": "precomputed"}[recipe.reference] if objective != "sft" else "none"
    )
    batch = math.ceil(recipe.batch_size / 2) if objective == "kto" else recipe.batch_size
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        plan = memory.Recipe(
            method=recipe.method, rank=recipe.rank, dropout=recipe.dropout,
            targets="all-linear" if recipe.targets == ("all-linear",) else recipe.targets,
            dtype="fp32" if recipe.method == "full" else recipe.precision,
            adapter_dtype="bf16" if recipe.method == "qlora" else "fp32",
            autocast=recipe.method == "full" and recipe.precision != "fp32", kbit_fp32=False,
            optimizer=OPTIMIZERS[recipe.optimizer], batch=batch, seq=longest,
            checkpointing=recipe.checkpointing, logits="chunked", objective="sft" if objective == "sft" else "dpo", reference=reference,
        )  # fmt: skip
        ledger = memory.estimate(memory.from_config(config), plan)
    except ValueError:
        return None
    return {
        "bytes": ledger.total_on_device if cuda else ledger.peak,
        "moment": ledger.peak_moment,
        "parts": ledger.categories(),
    }


def free_bytes(cuda: bool) -> int:
    """Free memory for this process: of its GPU, or its share of the machine's memory."""
    if cuda:
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_bytes(cuda: bool) -> int:
    """Most memory that this process has held: of the GPU (torch's allocator), or resident, imports included."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def too_little(need: dict | None, free: int) -> Finding | None:
    """The estimate is above what is free."""
    if need is None or need["bytes"] <= free:
        return None
    largest = max(need["parts"], key=need["parts"].get)
    return Finding(
        "too little memory", "warning",
        f"about {gb(need['bytes'])} are needed and {gb(free)} are free; most of it is {largest} ({gb(need['parts'][largest])}).",
        "Make batch_size smaller (and accumulation larger), shorten max_length, switch checkpointing on, or use qlora.",
    )  # fmt: skip


def gb(size: int) -> str:
    """Bytes for people: 10^9 bytes are one GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
