"""Learning rate schedules: which share of the peak rate an optimizer step uses.

What: warm-up, then constant, linear or cosine, as transformers defines them; and `early_linear`, which wastes no step.
Formula: step < warmup: step / warmup; afterwards p = (step - warmup) / (steps - warmup), share = 1 | 1 - p |
(1 + cos(pi p)) / 2 (cosine: SGDR, Loshchilov and Hutter 2016, arXiv 1608.03983, eq. 5, without restarts).
Steps count from 0. A step of transformers reads its share BEFORE the count goes up: with a warm-up the first one has
rate 0 and changes nothing.
Leaves out: restarts, polynomial, inverse square root, warm-up-stable-decay. Production: `transformers.get_scheduler`.
"""

import math


def constant(step: int, steps: int, warmup: int) -> float:
    """`get_constant_schedule_with_warmup`: the peak until the end. All schedules: step from 0; returns 0 to 1."""
    return step / warmup if step < warmup else 1.0


def linear(step: int, steps: int, warmup: int) -> float:
    """`get_linear_schedule_with_warmup`: down to 0 one step after the last."""
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(steps - warmup, 1))


def cosine(step: int, steps: int, warmup: int) -> float:
    """`get_cosine_schedule_with_warmup`: stays high longer, then falls faster; half of the peak at half of the way."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return max(0.0, (1 + math.cos(math.pi * progress)) / 2)


def early_linear(step: int, steps: int, warmup: int) -> float:
    """Linear with the warm-up counted from 1: the first step has rate 1 / warmup, and the last one is not 0."""
    return min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1), 1.0)
