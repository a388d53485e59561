"""Schedule a training step in few slots: recomputation as a game of actions, and its records.

What: a chain of `layers` equal layers. Slot: room for what one layer keeps. Three actions: `("forward", i)` makes
activation i out of activation i - 1 (activation 0, the batch, is always there); `("drop", i)` frees it;
`("backward", i)` uses and frees it. Layers go back in order, last first. `play` says what a schedule costs.
Papers: Chen et al. 1604.06174 (keep every k-th), Griewank and Walther 2000 (revolve: the fewest forwards for s slots).
Formula: t(l, s) = min over j of j + t(l - j, s - 1) + t(j - 1, s), t(0, s) = 0: run to j and keep it.
Leaves out: layers of different size and cost, and what a layer keeps inside (one slot holds it whole).
In production: `torch.utils.checkpoint`, transformers' `activation_checkpointing_enable` (keeps every layer's input).
"""

from dataclasses import dataclass
from functools import cache

Action = tuple[str, int]


@dataclass(frozen=True)
class Played:
    """What a schedule cost: slots held after each action, the most at one time, and how many forwards it ran."""

    held: tuple[int, ...]
    peak: int
    forwards: int


def play(actions: list[Action], layers: int) -> Played:
    """Run a schedule for `layers` layers. Raises ValueError, one sentence, at the first action that breaks a rule."""
    held, counts, forwards, next_back = {0}, [], 0, layers
    for n, (what, i) in enumerate(actions, start=1):
        where = f"action {n}, {what} {i}: "
        if what not in ("forward", "drop", "backward") or not 1 <= i <= layers:
            raise ValueError(f"{where}an action is (forward | drop | backward, a layer from 1 to {layers})")
        if what == "forward" and i - 1 not in held:
            raise ValueError(f"{where}activation {i - 1} is not held, so layer {i} has no input")
        if what != "forward" and i not in held:
            raise ValueError(f"{where}activation {i} is not held: it was never made, or dropped")
        if what == "backward" and i != next_back:
            raise ValueError(f"{where}layer {next_back} must go back first")
        if what == "forward":
            held.add(i)
            forwards += 1
        else:
            held.remove(i)
            next_back -= what == "backward"
        counts.append(len(held) - 1)
    if next_back:
        raise ValueError(f"the schedule ends before layer {next_back} went back")
    return Played(tuple(counts), max(counts), forwards)


def keep_all(layers: int) -> list[Action]:
    """No checkpointing: every activation waits for its backward. `layers` slots, `layers` forwards."""
    return [("forward", i) for i in range(1, layers + 1)] + [("backward", i) for i in range(layers, 0, -1)]


def keep_every(layers: int, step: int) -> list[Action]:
    """Keep activations step, 2 step, ...; run each stretch between them again when its backward comes.

    The last stretch is kept as it was made. Slots: about layers / step + step; forwards: fewer than 2 * layers.
    """
    last = (layers - 1) // step * step  # where the last stretch begins
    actions = []
    for i in range(1, layers + 1):
        actions.append(("forward", i))
        if i - 1 < last and (i - 1) % step:
            actions.append(("drop", i - 1))
    for start in range(last, -1, -step):
        if start < last:
            actions += [("forward", i) for i in range(start + 1, start + step)]
        stop = min(start + step, layers)
        actions += [("backward", i) for i in range(stop, start, -1)]
    return actions


@cache
def fewest_forwards(layers: int, slots: int) -> int:
    """The record: forwards that no schedule in so many slots can undercut. Raises ValueError when none fits."""
    if layers <= 1:
        return layers
    if slots < 2:
        raise ValueError(f"{layers} layers do not fit into {slots} slot: a forward needs its input beside its output")
    return min(_cost(layers, slots, keep) for keep in _choices(layers, slots))


def best_schedule(layers: int, slots: int, first: int = 0) -> list[Action]:
    """A schedule that reaches the record, for the layers first + 1 to first + layers."""
    if layers == 0:
        return []
    keep = min(_choices(layers, slots), key=lambda j: _cost(layers, slots, j))
    actions = [("forward", first + 1)]
    for i in range(2, keep + 1):
        actions += [("forward", first + i), ("drop", first + i - 1)]
    actions += best_schedule(layers - keep, slots - 1, first + keep)
    return [*actions, ("backward", first + keep), *best_schedule(keep - 1, slots, first)]


def _choices(layers: int, slots: int) -> range:
    """Which activation may be kept first; the rest must still fit into one slot less."""
    return range(1 if layers == 1 or slots > 2 else layers - 1, layers + 1)


def _cost(layers: int, slots: int, keep: int) -> int:
    return keep + fewest_forwards(layers - keep, slots - 1) + fewest_forwards(keep - 1, slots)
