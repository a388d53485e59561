"""One rank of many: what DDP copies, what ZeRO and FSDP divide, what offloading and paging move to the host.

ZeRO 1910.02054, figure 1: stage 1 divides the optimizer's states (and master weights), stage 2 also gradients, stage 3
also weights. FSDP divides as stage 3. Derived from the papers and held to measured shares of real runs (DDP, ZeRO-1,
FSDP on two processes); the bytes of one gathered layer stand for buffers whose sizes are settings.
Leaves out: communication buffers of NCCL, DeepSpeed's bucket settings, padding of uneven shards.
"""

from dataclasses import replace
from math import ceil

from finetune_lab.methods.memory.architecture import Architecture
from finetune_lab.methods.memory.ledger import Ledger, Line
from finetune_lab.methods.memory.recipe import DTYPES, Recipe

DIVIDED = {
    "none": (),
    "ddp": (),
    "zero1": ("optimizer", "master weights"),
    "zero2": ("optimizer", "master weights", "gradients"),
    "zero3": ("optimizer", "master weights", "gradients", "weights", "adapters", "quantisation state"),
    "fsdp": ("optimizer", "master weights", "gradients", "weights", "adapters", "quantisation state"),
}
HOSTED = {
    "none": (),
    "optimizer": ("optimizer", "master weights"),
    "all": ("optimizer", "master weights", "weights", "quantisation state"),
}


def on_one_rank(ledger: Ledger, architecture: Architecture, recipe: Recipe) -> Ledger:
    """The ledger of one of `recipe.ranks` devices, with what the host holds for it in `host`."""
    divided = DIVIDED[recipe.sharding] if recipe.ranks > 1 else ()
    hosted = HOSTED[recipe.offload]
    if recipe.optimizer.startswith("paged"):
        hosted = {*hosted, "optimizer"}
    copies = recipe.sharding == "ddp" and recipe.ranks > 1
    if not (divided or hosted or copies):
        return ledger

    def share(category: str, size: int) -> int:
        return ceil(size / recipe.ranks) if category in divided else size

    layer = architecture.layer_parameters() * DTYPES[recipe.dtype]
    gathered = 2 * layer if {"weights"} & ({*divided} | {*hosted}) else 0  # one layer at work, the next on its way
    lines, host = [], []
    for line in ledger.lines:
        why = f"{line.why}; 1/{recipe.ranks} of it" if line.category in divided else line.why
        line = replace(line, bytes=share(line.category, line.bytes), why=why)
        (host if line.category in hosted else lines).append(line)
    buckets = ledger.total("gradients") if copies else 0
    if buckets:
        lines.append(
            Line("gradients", "DDP buckets", buckets, "a copy of every gradient (gradient_as_bucket_view off)")
        )
    if gathered:
        lines.append(Line("temporaries", "gathered layers", gathered, f"2 layers x {layer} bytes"))
    moments = []
    for moment, alive in ledger.moments:
        alive = {k: share(k, v) for k, v in alive.items() if k not in hosted}
        if moment != "after loading":
            alive["temporaries"] = alive.get("temporaries", 0) + gathered
            alive["gradients"] = alive.get("gradients", 0) + buckets
        moments.append((moment, alive))
    return replace(ledger, lines=tuple(lines), moments=tuple(moments), host=tuple(host))
