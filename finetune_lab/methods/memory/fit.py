"""What is the most that fits into so many bytes, and which lever buys most?

    largest(lambda batch: fits(architecture, replace(recipe, batch=batch), budget), 4096)
    savings(architecture, recipe) -> each lever pulled alone, the one that saves most first

Everything here only asks `estimate`; it knows no formula of its own. A lever is judged by the peak of the whole step: what
it takes away at another moment is worth nothing, and then `why` says which moment holds the peak.
Leaves out: levers together (pull one, then ask again), and what they do to the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from finetune_lab.methods.memory.architecture import Architecture, from_config
from finetune_lab.methods.memory.estimate import estimate
from finetune_lab.methods.memory.ledger import CATEGORIES, Ledger
from finetune_lab.methods.memory.presets import PRESETS
from finetune_lab.methods.memory.recipe import Recipe

SEQ_STEP = 64  # sequences are searched in steps of so many tokens
SEQ_LIMIT, BATCH_LIMIT = 2**20, 2**14
LATER_SHARDING = {"none": "zero1", "ddp": "zero1", "zero1": "zero2", "zero2": "zero3"}


@dataclass(frozen=True)
class Lever:
    """One change of a recipe. `change(recipe)` gives the fields to replace, or None where it does not apply."""

    name: str
    price: str
    change: Callable[[Recipe], dict | None]


def _if(condition: bool, **fields) -> dict | None:
    return fields if condition else None


LEVERS = (
    Lever("checkpointing", "a second forward pass of every layer: up to 1/3 more work, 1/2 where weights are frozen",
          lambda r: _if(not r.checkpointing, checkpointing=True)),
    Lever("8-bit Adam", "moments in 256-value blocks of one byte each; small tensors stay in fp32",
          lambda r: _if(r.optimizer in ("adamw", "paged-adamw"), optimizer="adamw-8bit")),
    Lever("paged 8-bit Adam", "moments may live in the host's memory; slow when they have to move",
          lambda r: _if(r.optimizer in ("adamw", "paged-adamw", "adamw-8bit"), optimizer="paged-adamw-8bit")),
    Lever("Adafactor", "no first moment, a factored second one: another optimizer, another learning rate",
          lambda r: _if(r.optimizer not in ("adafactor", "sgd", "sgd-momentum"), optimizer="adafactor")),
    Lever("fused update", "nothing: the same numbers without a temporary as large as a state",
          lambda r: _if(r.update == "foreach", update="fused")),
    Lever("loss only where there is a label", "nothing: the same loss, logits of the other positions are not made",
          lambda r: _if(r.logits == "full" and r.labelled < 1, logits="labelled")),
    Lever("chunked cross-entropy", "another loss function: methods.loss.chunked_loss, Liger or TRL",
          lambda r: _if(r.logits != "chunked", logits="chunked")),
    Lever("sdpa attention", "nothing: the same attention without the (seq, seq) matrix",
          lambda r: _if(r.attention == "eager", attention="sdpa")),
    Lever("LoRA instead of full fine-tuning", "an update of low rank",
          lambda r: _if(r.method == "full", method="lora", master_weights=False, autocast=False)),
    Lever("a 4-bit base (QLoRA)", "an approximate base; each weight is dequantised at each use",
          lambda r: _if(r.method in ("lora", "dora"), method="q" + r.method, autocast=False)),
    Lever("LoRA instead of DoRA", "no magnitudes",
          lambda r: {"dora": {"method": "lora"}, "qdora": {"method": "qlora"}}.get(r.method)),
    Lever("bf16 weights", "coarser updates where all weights train",
          lambda r: _if(r.dtype == "fp32", dtype="bf16", autocast=False)),
    Lever("no fp32 master copy", "small updates are rounded away in bf16",
          lambda r: _if(r.master_weights, master_weights=False)),
    Lever("bf16 adapters", "coarser updates of the adapter (peft: autocast_adapter_dtype=False)",
          lambda r: _if(r.adapts and r.adapter_dtype == "fp32" and r.dtype != "fp32", adapter_dtype=r.dtype)),
    Lever("no adapter dropout", "less regularisation", lambda r: _if(r.adapts and r.dropout > 0, dropout=0.0)),
    Lever("half the rank", "a smaller update", lambda r: _if(r.adapts and r.rank > 1, rank=r.rank // 2)),
    Lever("no fp32 upcast of the rest", "norms and embeddings stay in 16 bits (skip prepare_model_for_kbit_training)",
          lambda r: _if(r.quantised and r.kbit_fp32, kbit_fp32=False)),
    Lever("double quantisation", "scales of one byte", lambda r: _if(r.quantised and not r.double_quant, double_quant=True)),
    Lever("half the batch, two accumulation steps", "the same gradient (count the tokens), more steps",
          lambda r: _if(r.batch > 1, batch=r.batch // 2)),
    Lever("half the sequence", "longer texts are cut or split", lambda r: _if(r.seq > 1, seq=r.seq // 2)),
    Lever("reference by switching the adapter off", "nothing: the base is the reference",
          lambda r: _if(r.reference == "separate" and r.adapts, reference="adapter-off")),
    Lever("reference computed beforehand", "one pass over the data first",
          lambda r: _if(r.reference in ("separate", "adapter-off") and r.objective == "dpo", reference="precomputed")),
    Lever("optimizer in the host's memory", "states travel at every step",
          lambda r: _if(r.offload == "none", offload="optimizer")),
    Lever("the next sharding stage", "more traffic between the cards",
          lambda r: _if(r.ranks > 1 and r.sharding in LATER_SHARDING, sharding=LATER_SHARDING.get(r.sharding))),
)  # fmt: skip


@dataclass(frozen=True)
class Saving:
    """What one lever does to the peak of one step. `saves` in bytes: negative means that it costs memory."""

    lever: str
    change: dict
    saves: int
    why: str
    price: str


def savings(architecture: Architecture, recipe: Recipe) -> list[Saving]:
    """Every lever that applies, pulled alone, sorted by the bytes that the peak on the device loses."""
    before = estimate(architecture, recipe)
    found = []
    for lever in LEVERS:
        change = lever.change(recipe)
        if change is None:
            continue
        try:
            after = estimate(architecture, replace(recipe, **change))
        except ValueError:  # does not go with the rest of this recipe
            continue
        saved = before.total_on_device - after.total_on_device
        found.append(Saving(lever.name, change, saved, explain(before, after), lever.price))
    return sorted(found, key=lambda saving: -saving.saves)


def explain(before: Ledger, after: Ledger) -> str:
    """In words: which categories went down at the peak, and where the peak is now; or why nothing was won."""
    old, new = before.categories(), after.categories()
    if after.total_on_device >= before.total_on_device:
        touched = _changed(_fullest(before), _fullest(after))
        if not touched:
            return "nothing changes in this recipe"
        if after.total_on_device > before.total_on_device:
            return f"{_most(_changed(new, old))} grow"
        return f"the peak is the {before.peak_moment}, and what shrinks ({_most(touched)}) does not fill it"
    less = _most(_changed(old, new))
    if after.peak_moment == before.peak_moment:
        return f"less {less}"
    return f"less {less}; the peak is then the {after.peak_moment}"


def _fullest(ledger: Ledger) -> dict[str, int]:
    """Each category at its own fullest moment."""
    full: dict[str, int] = {}
    for _, alive in ledger.moments:
        for category, size in alive.items():
            full[category] = max(full.get(category, 0), size)
    return full


def _changed(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    """{category: bytes by which `first` is larger}, those only."""
    differences = {name: first.get(name, 0) - second.get(name, 0) for name in CATEGORIES}
    return {name: size for name, size in differences.items() if size > 0}


def _most(sizes: dict[str, int]) -> str:
    """The categories that make up nine tenths of the bytes, largest first."""
    names, sum_, total = [], 0, sum(sizes.values())
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        names.append(name)
        sum_ += size
        if sum_ >= 0.9 * total:
            break
    return " and ".join(names)


def fits(architecture: Architecture, recipe: Recipe, budget: int) -> bool:
    """Does one step need at most `budget` bytes on the device, CUDA context and fragmentation included?"""
    return estimate(architecture, recipe).total_on_device <= budget


def largest(good: Callable[[int], bool], limit: int) -> int:
    """The largest n in 1..limit with good(n), 0 when good(1) is false. `good` must not turn true again."""
    if not good(1):
        return 0
    low = 1
    while low < limit and good(min(2 * low, limit)):
        low = min(2 * low, limit)
    high = min(2 * low, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def largest_batch(architecture: Architecture, recipe: Recipe, budget: int) -> int:
    """The largest batch at this sequence length; 0 when not even one sequence fits."""
    return largest(lambda n: fits(architecture, replace(recipe, batch=n), budget), BATCH_LIMIT)


def largest_seq(architecture: Architecture, recipe: Recipe, budget: int) -> int:
    """The longest sequence at this batch in steps of 64 tokens, up to the model's positions where they are known."""
    limit = architecture.max_positions or SEQ_LIMIT
    return SEQ_STEP * largest(
        lambda n: fits(architecture, replace(recipe, seq=SEQ_STEP * n), budget), limit // SEQ_STEP
    )


def models_that_fit(recipe: Recipe, budget: int) -> list[tuple[str, int, int]]:
    """(preset, parameters, bytes on the device) of every preset that fits with this recipe, largest model first."""
    found = []
    for name, config in PRESETS.items():
        architecture = from_config(config, name)
        try:
            need = estimate(architecture, recipe).total_on_device
        except ValueError:  # targets that this model does not have
            continue
        if need <= budget:
            found.append((name, architecture.parameters(), need))
    return sorted(found, key=lambda row: -row[1])
