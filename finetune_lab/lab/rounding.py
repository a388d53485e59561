"""Round weights to few bits and restore them: what a format costs, on any numbers and on a model's own weights.

Formats are functions (w, blocksize) -> restored w, fp32. `rounded(model, ...)` puts restored weights into a model for
as long as a `with` block lasts, so that its perplexity and scores can be measured. Leaves out: packing (methods.nf4)
and rounding of activations. In production: bitsandbytes, GPTQ, AWQ.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune_lab.lab import fetch
from finetune_lab.lab.models import load
from finetune_lab.methods.codebooks import (
    affine_round_trip,
    fp4_code,
    int_code,
    lloyd_max,
    nearest,
    nf4_code,
    round_trip,
    symmetric_quantile_code,
)
from finetune_lab.methods.inject import find_targets

Format = Callable[[Tensor, int], Tensor]


def by_code(code: Tensor) -> Format:
    """The format that rounds to the levels of a code, one absmax a block."""
    return lambda w, blocksize: round_trip(w, code, min(blocksize, w.numel()))


FORMATS: dict[str, Format] = {
    "NF4": by_code(nf4_code()),
    "FP4": by_code(fp4_code()),
    "INT4": by_code(int_code(4)),
    "INT4 zero-point": lambda w, blocksize: affine_round_trip(w, 4, min(blocksize, w.numel())),
    "INT8": by_code(int_code(8)),
    "symmetric quantiles": by_code(symmetric_quantile_code()),
}


def errors(w: Tensor, restored: Tensor) -> dict[str, float]:
    """Mean square error over the variance of `w`, and the largest error over its standard deviation."""
    difference = (restored - w).double()
    variance = w.double().var(unbiased=False)
    return {
        "mean square error / variance": float(difference.square().mean() / variance),
        "largest error / standard deviation": float(difference.abs().max() / variance.sqrt()),
    }


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that 4-bit loading quantises: every linear layer but the output head."""
    return [model.get_submodule(path).weight for path in find_targets(model, "all-linear")]


@contextmanager
def rounded(model: nn.Module, restore: Format, blocksize: int) -> Iterator[nn.Module]:
    """Within the `with` block the linear weights of `model` are what the format makes of them; then they are back."""
    weights = linear_weights(model)
    kept = [w.data for w in weights]
    try:
        for w in weights:
            w.data = restore(w.data, blocksize).to(w.dtype)
        yield model
    finally:
        for w, data in zip(weights, kept, strict=True):
            w.data = data


def weights_by_kind(samples: int, real: bool) -> dict[str, Tensor]:
    """Weights (n,) fp32 by kind: three drawn by program, the tiny model's, and, if `real` and its files are on this
    machine, a fifth of SmolLM2's matrices."""
    torch.manual_seed(0)
    found = {
        "Gaussian": torch.randn(samples),
        "uniform": 2 * torch.rand(samples) - 1,
        "heavy-tailed": torch.distributions.StudentT(3.0).sample((samples,)),
        "tiny": torch.cat([w.detach().flatten() for w in linear_weights(load("tiny")[0])]),
    }
    if real and fetch.cached_smollm2() is not None:
        found["smollm2"] = torch.cat([w.detach().flatten() for w in linear_weights(load("smollm2-135m")[0])[::5]])
    return found


def optimality(w: Tensor, shift: float = 0.01) -> dict[str, tuple]:
    """Is NF4 the code of least error for blocks of 64 of `w`? name -> (value, unit, name and value to compare with).

    Each inner level is moved both ways alone, then all of them by Lloyd's iteration.
    """
    x = w[: len(w) // 64 * 64].view(-1, 64)
    scaled = (x / x.abs().amax(1, keepdim=True)).flatten()
    code = nf4_code()

    def error(levels: Tensor) -> float:
        return errors(w, round_trip(w, levels, 64))["mean square error / variance"]

    base, moved = error(code), []
    for level in range(1, 15):
        step = torch.zeros(16)
        step[level] = shift
        moved.append(min(error(code - step), error(code + step)) / base)
    best = lloyd_max(scaled, code)
    share = torch.bincount(nearest(scaled, code).long(), minlength=16) / len(scaled)
    return {
        f"inner levels of NF4 that a shift by {shift} improves, of 14": (sum(m < 1 for m in moved), "count"),
        f"error after the best single shift by {shift}, over NF4's": (min(moved),),
        "error of Lloyd-Max, over NF4's": (error(best) / base, "1", "NF4's error", base),
        "largest move of a level by Lloyd-Max": (float((best - code).abs().max()),),
        "share of the fullest bin": (float(share.max()), "1", "equal shares", 1 / 16),
        "share of the emptiest bin": (float(share.min()), "1", "equal shares", 1 / 16),
        "entropy of the codes": (float(-(share * share.log2()).sum()), "bit", "equal shares", 4.0),
    }
