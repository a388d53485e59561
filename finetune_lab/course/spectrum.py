"""The explorer of lesson 03: what rank and alpha do to the spectrum of an update.

    figure, text = spectrum(singular_values, (out, in), rank=8, alpha=16)      # pure: for Explorer

The full update's singular values, and those of the best LoRA of this rank: its B A is the update cut to its `rank`
strongest directions (Eckart and Young), written with the factor alpha/r. Rank cuts, alpha stretches.
"""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from finetune_lab.course import plots
from finetune_lab.errors import UserError
from finetune_lab.methods.counts import lora_parameters
from finetune_lab.methods.lora import lora_scaling


def spectrum(values: Sequence[float], shape: tuple[int, int], rank: int, alpha: float) -> tuple[Figure, str]:
    """(figure, sentence) for the singular values of an update (out, in), largest first.

    The sentence tells the share of the squared norm that `rank` directions can hold, the scale, how far scale * B A is
    from the update (0 % at alpha = rank with all directions), and the numbers to train.
    Raises UserError for a rank that is not in 1 to len(values).
    """
    if not 1 <= rank <= len(values):
        raise UserError(f"rank {rank}: this matrix of {shape[0]} by {shape[1]} has ranks from 1 to {len(values)}")
    scale = lora_scaling(alpha, rank)
    kept = [scale * value for value in values[:rank]]
    does = "keeps the size" if scale == 1 else "stretches" if scale > 1 else "shrinks"
    title = f"Rank {rank} cuts, alpha {alpha:g} {does}"
    figure, ax = plots.axes(title, "direction, strongest first", "singular value")
    ax.plot(range(1, len(values) + 1), values, color=plots.BLUE, marker="o", markevery=max(1, len(values) // 8))
    ax.plot(range(1, rank + 1), kept, color=plots.VERMILLION, marker="s", markevery=max(1, rank // 8))
    ax.set_yscale("log")
    middle = len(values) // 2
    ax.annotate(
        "full update", (middle + 1, values[middle]), xytext=(6, 8), textcoords="offset points", color=plots.BLUE
    )
    ax.annotate(
        "LoRA", (rank, kept[-1]), xytext=(7, 0), textcoords="offset points", va="center", color=plots.VERMILLION
    )
    total = sum(value**2 for value in values)
    held = sum(value**2 for value in values[:rank]) / total
    missed = sum((value - new) ** 2 for value, new in zip(values, kept, strict=False))
    distance = math.sqrt((missed + sum(value**2 for value in values[rank:])) / total)
    numbers = lora_parameters(shape[1], shape[0], rank)
    return figure, (
        f"rank {rank} can hold {100 * held:.0f} % of the energy; scale alpha/r = {scale:.3g}; this update misses the full "
        f"one by {100 * distance:.0f} %; {numbers:,} numbers, {100 * numbers / (shape[0] * shape[1]):.1f} % of the matrix"
    )
