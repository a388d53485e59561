"""From an architecture and a recipe to the ledger."""

from finetune_lab.methods.memory.architecture import Architecture
from finetune_lab.methods.memory.ledger import Ledger, Line
from finetune_lab.methods.memory.recipe import DTYPES, Recipe
from finetune_lab.methods.memory.states import TABLE, state_bytes, tensors, weight_bytes


def _kept(architecture: Architecture, recipe: Recipe) -> list[Line]:
    found = tensors(architecture, recipe)
    lines = []
    for adapter, category in ((False, "weights"), (True, "adapters")):
        for t in found:
            if t.adapter == adapter:
                stored, constants = weight_bytes(t, recipe)
                why = f"{t.copies} x {' x '.join(map(str, t.shape))} x {'0.5' if t.quantised else t.size} bytes"
                lines.append(Line(category, t.name, t.copies * stored, why))
                if constants:
                    lines.append(Line("quantisation state", t.name, t.copies * constants, "absmax of its blocks"))
    if recipe.quantised and recipe.double_quant:
        lines.append(Line("quantisation state", "table", TABLE, "256 levels x 4 bytes, once"))
    for t in found:
        if t.trained:
            lines.append(Line("gradients", t.name, t.copies * t.numel * t.size, f"{t.copies} x {t.numel} x {t.size}"))
            lines.append(Line("optimizer", t.name, t.copies * state_bytes(t, recipe), recipe.optimizer))
            if recipe.master_weights and t.size == 2:
                lines.append(Line("master weights", t.name, 4 * t.copies * t.numel, "4 bytes each"))
    return lines


def estimate(architecture: Architecture, recipe: Recipe) -> Ledger:
    """First version: what stays is exact, activations are the closed form of MEASURED A4 for all families."""
    lines = _kept(architecture, recipe)
    total = {}
    for line in lines:
        total[line.category] = total.get(line.category, 0) + line.bytes
    a, r, tokens = architecture, recipe.rank, recipe.batch * recipe.seq
    own = DTYPES[recipe.dtype] / 2
    per = (16 * a.hidden + 8 + 4 * a.query_width + 4 * a.kv_width + 4 * a.heads + 8 * a.intermediate) * own
    if recipe.adapts:
        fp32 = recipe.adapter_dtype == "fp32" and recipe.dtype != "fp32"
        per += 12 * a.hidden + 2 * a.intermediate + 4 * a.query_width + 28 * r if fp32 else -4 * a.hidden + 14 * r
    if recipe.attention == "eager":
        per += 12 * a.heads * recipe.seq
    kept = a.layers * 2 * a.hidden if recipe.checkpointing else a.layers * per
    activations = int(tokens * (kept + 8 * a.hidden))
    once = int(tokens * per) if recipe.checkpointing else 0
    logits = int(tokens * a.vocab * (recipe.labelled if recipe.logits != "full" else 1))
    lines += [Line("activations", "saved for backward", activations, f"{tokens} tokens x {a.layers} layers"),
              Line("logits", "fp32 log-softmax", 4 * logits, f"{logits} x 4")]  # fmt: skip
    stays = {k: v for k, v in total.items() if k not in ("gradients",)}
    gradients = total.get("gradients", 0)
    moments = (
        ("after loading", dict(stays)),
        ("end of forward", stays | {"activations": activations, "logits": 10 * logits}),
        ("backward of the head", stays | {"activations": activations, "logits": 14 * logits}),
        ("backward of a layer", stays | {"activations": activations, "temporaries": once, "gradients": gradients}),
        ("optimizer step", stays | {"gradients": gradients}),
    )
    device = (Line("context", "CUDA context", 500_000_000, "stated, not proved: 0.3 to 0.6 GB by GPU and driver"),)
    return Ledger(tuple(lines), moments, device)
