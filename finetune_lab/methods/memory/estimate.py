"""From an architecture and a recipe to the ledger: what stays, a dry run of one step, the optimizer's own moment.

The dry run (`tape.py`, `model.py`) is done for two and three layers and continued as a straight line: every layer is
equal, so each moment's bytes are linear in the number of layers (checked to the byte). Milliseconds for any model.
The step is the second one, so that the optimizer's states are there: zero_grad(set_to_none), loss, backward, step.
Proved on the CPU, storage by storage, against transformers + peft + bitsandbytes: see `finetune-lab bench vram`.
Derived only: GaLore, paging, sharding, everything in `device` lines.
"""

from dataclasses import replace
from functools import lru_cache

from finetune_lab.methods.memory.architecture import Architecture
from finetune_lab.methods.memory.ledger import Ledger, Line
from finetune_lab.methods.memory.model import Decoder
from finetune_lab.methods.memory.objectives import beside, reference_moments, rollout_moments, sequences
from finetune_lab.methods.memory.ranks import on_one_rank
from finetune_lab.methods.memory.recipe import DTYPES, Recipe
from finetune_lab.methods.memory.states import Tensor, state_bytes, tensors, weight_bytes
from finetune_lab.methods.memory.tape import Tape

MOMENTS = {  # place on the tape -> moment in the ledger
    "forward": "forward",
    "loss": "loss",
    "end of forward": "end of forward",
    "backward of the head": "backward of the head",
    "backward of the last layer": "backward of the last layer",
    "backward of a layer": "backward of a layer between",
    "backward of the first layer": "backward of the first layer",
    "backward of the embedding": "backward of the embedding",
    "end of backward": "end of backward",
}


def kept_lines(found: list[Tensor], recipe: Recipe) -> list[Line]:
    """Weights, adapters, quantisation constants, gradients, master weights and optimizer states."""
    lines = []
    for t in found:
        stored, constants = weight_bytes(t, recipe)
        shape = " x ".join(str(n) for n in (t.copies, *t.shape))
        lines.append(
            Line("adapters" if t.adapter else "weights", t.name, t.copies * stored,
                 f"{shape} x {(1 if recipe.int8 else 0.5) if t.quantised else t.size} bytes")
        )  # fmt: skip
        if constants:
            why = f"scales of blocks of {recipe.quant_block}, tables of levels"
            why = f"{t.copies} x {constants}: {'an fp32 scale for each row' if recipe.int8 else why}"
            lines.append(Line("quantisation state", t.name, t.copies * constants, why))
        if t.trained:
            count = t.copies * t.numel
            lines.append(Line("gradients", t.name, count * t.size, f"{shape} x {t.size} bytes"))
            if recipe.master_weights and t.size == 2:
                lines.append(Line("master weights", t.name, 4 * count, f"{shape} x 4 bytes"))
            if state := state_bytes(t, recipe):
                lines.append(Line("optimizer", t.name, t.copies * state, f"{t.copies} x {state}: {recipe.optimizer}"))
    return lines


def _dry_run(architecture: Architecture, recipe: Recipe, layers: int, device: str, traced: bool, frozen: bool) -> dict:
    """{moment: {kind: bytes}} of forward and backward with so many layers, beside what stays."""
    batch = sequences(recipe)
    tape = Tape(device, traced)
    inputs = tape.new(2 * batch * recipe.seq, 8, "activations")  # token ids and labels
    tape.peaks.clear()
    loss = Decoder(tape, architecture, recipe, layers, batch, frozen).loss(
        "sequences" if recipe.objective == "reward" else "tokens"
    )
    tape.peaks["end of forward"] = (tape.now, dict(tape.alive))
    if not frozen:
        tape.backward(loss)
    del loss
    tape.peaks["end of backward"] = (tape.now, dict(tape.alive))
    del inputs
    best: dict[str, tuple[int, dict]] = {}
    for place, found in tape.peaks.items():
        place = place.split("#")[0]
        if place not in best or found[0] > best[place][0]:
            best[place] = found
    return {place: alive for place, (_, alive) in best.items()}


@lru_cache(maxsize=512)
def _step(architecture: Architecture, recipe: Recipe, device: str, traced: bool, frozen: bool = False) -> tuple:
    """((moment, {kind: bytes}), ...) of forward and backward for all layers of the model."""
    layers = architecture.layers
    if layers <= 3:
        found = _dry_run(architecture, recipe, layers, device, traced, frozen)
        return tuple((MOMENTS[place], found[place]) for place in MOMENTS if place in found)
    two = _dry_run(architecture, recipe, 2, device, traced, frozen)
    three = _dry_run(architecture, recipe, 3, device, traced, frozen)
    moments = []
    for place, moment in MOMENTS.items():
        if place in three and place != "backward of a layer":  # a layer between is never fuller than both its ends
            low, high = two[place], three[place]
            kinds = {k: low.get(k, 0) + (layers - 2) * (high.get(k, 0) - low.get(k, 0)) for k in high | low}
            moments.append((moment, kinds))
    return tuple(moments)


def update_bytes(found: list[Tensor], recipe: Recipe, layers: int) -> int:
    """Temporaries of `optimizer.step()` at their fullest.

    fused: none. foreach: one list as large as the second moments. loop: for each tensor the square root and the
    quotient, while the last tensor's quotient is still a local variable (torch/optim/adam.py, _single_tensor_adam).
    """
    if recipe.optimizer == "adafactor":
        largest = max((t.numel for t in found if t.trained), default=0)
        return 2 * 4 * largest
    if recipe.optimizer not in ("adamw", "galore-adamw") or recipe.update == "fused":
        return 0
    size = DTYPES[recipe.optimizer_dtype] if recipe.optimizer_dtype else 4 if recipe.master_weights else None
    inner = [i for i, t in enumerate(found) if t.name.endswith(("_proj", "norms"))]  # the first and last of a layer
    layer = [t for t in found[inner[0] : inner[-1] + 1] for _ in range(t.copies // layers)]
    order = found[: inner[0]] + layer * min(layers, 2) + found[inner[-1] + 1 :]
    sizes = [t.numel * (size or t.size) for t in order if t.trained]
    if recipe.update == "foreach":
        return sum(t.copies * t.numel * (size or t.size) for t in found if t.trained)
    return max((2 * now + before for before, now in zip([0, *sizes], sizes, strict=False)), default=0)


def estimate(architecture: Architecture, recipe: Recipe, device: str = "cuda", traced: bool = False) -> Ledger:
    """The ledger of one training step on one device.

    device: "cuda", or "cpu" where kernels differ (dropout's mask). traced: as a dispatch-mode tracker counts, with
    gradients added out of place and no buffers inside kernels (what the proof compares).
    """
    found = tensors(architecture, recipe)
    lines = kept_lines(found, recipe)
    policy: dict[str, int] = {}
    for line in lines:
        policy[line.category] = policy.get(line.category, 0) + line.bytes
    lines += beside(architecture, recipe, policy)
    stays: dict[str, int] = {}
    for line in lines:
        if line.category != "gradients":
            stays[line.category] = stays.get(line.category, 0) + line.bytes

    plain = replace(recipe, optimizer="sgd", update="fused", ranks=1, sharding="none", offload="none")
    step = dict(_step(architecture, plain, device, traced))

    def frozen() -> dict[str, int]:
        seen = dict(_step(architecture, replace(plain, checkpointing=False), device, traced, frozen=True))
        return max(seen["forward"], seen["loss"], key=lambda alive: sum(alive.values()))

    extra = rollout_moments(architecture, recipe)
    for moment, kinds in step.items():
        extra.append((moment, kinds))
        if moment == "end of forward":
            extra += reference_moments(recipe, kinds, frozen)
    update = dict(step["end of backward"])
    update["temporaries"] = update.get("temporaries", 0) + update_bytes(found, recipe, architecture.layers)
    extra.append(("optimizer step", update))
    moments = [("after loading", dict(stays))]
    moments += [(name, {k: stays.get(k, 0) + alive.get(k, 0) for k in stays | alive}) for name, alive in extra]
    end, tokens = step["end of forward"], sequences(recipe) * recipe.seq
    for category in ("activations", "logits"):
        size = end.get(category, 0)
        why = f"alive at the end of forward: {tokens} tokens, {size / tokens:.0f} bytes each"
        lines.append(Line(category, "saved for backward", size, why))
    ledger = Ledger(tuple(lines), tuple(moments))
    ledger = on_one_rank(ledger, architecture, recipe)
    return replace(ledger, device=device_lines(ledger, found))


def device_lines(ledger: Ledger, found: list[Tensor]) -> tuple[Line, ...]:
    """CUDA context and allocator, stated and not proved: no CPU has them.

    The caching allocator rounds each block up to 512 bytes and keeps blocks that it cannot use again.
    """
    blocks = sum(t.copies * (1 + 3 * t.trained) for t in found)
    return (
        Line(
            "context",
            "CUDA context and libraries",
            500_000_000,
            "an assumption: differs by GPU, driver and libraries, not measured here",
        ),
        Line(
            "fragmentation", "rounding to 512 bytes", 256 * blocks, f"{blocks} lasting tensors x 256 bytes on average"
        ),
        Line(
            "fragmentation",
            "unusable cached blocks",
            ledger.peak // 50,
            "2 % of the peak, an assumption, not measured here",
        ),
    )
