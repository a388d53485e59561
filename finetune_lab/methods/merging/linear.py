"""Merging by straight lines and arcs: weighted means of models, SLERP, and arithmetic with task vectors.

Papers: Wortsman et al. 2022, Model soups (arXiv 2203.05482): the mean; Shoemake 1985, Animating Rotation with
Quaternion Curves: SLERP; Ilharco et al. 2023, Editing Models with Task Arithmetic (arXiv 2212.04089), section 2.
Formulas: sum_i w_i theta_i;  slerp_t(a, b) = sin((1-t) W)/sin(W) a + sin(t W)/sin(W) b, W = angle between a and b;
tau = theta_ft - theta_base,  theta = theta_base + lam * sum_i w_i tau_i.
Leaves out: choosing the weights (greedy soups), whole checkpoints (`finetune-lab merge`). One tensor at a time, in fp32.
In production: mergekit's `linear`, `slerp` and `task_arithmetic`; for adapters `peft.utils.merge_utils`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NEARLY_PARALLEL = 0.9995  # above this |cosine| (below about 1.8 degrees) an arc is a line; mergekit's threshold


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that merging computes in: fp32, or fp64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def weighted(tensors: Sequence[Tensor], weights: Sequence[float] | None) -> list[float]:
    """One weight per tensor (None: all 1). Raises ValueError for other counts, no tensors or unequal shapes."""
    if not tensors:
        raise ValueError("no tensors were given: a merge needs at least one")
    if len({tuple(t.shape) for t in tensors}) > 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"shapes {shapes}: all tensors need the same shape")
    weights = [1.0] * len(tensors) if weights is None else list(weights)
    if len(weights) != len(tensors):
        raise ValueError(f"{len(weights)} weights for {len(tensors)} tensors: give one weight per tensor")
    return weights


def linear(tensors: Sequence[Tensor], weights: Sequence[float] | None = None, normalize: bool = True) -> Tensor:
    """sum_i w_i theta_i, divided by the sum of the weights if `normalize` (mergekit's default); dtype of the first.

    tensors: the same weight of every model, equal shapes; weights: any finite numbers, None for the plain mean.
    Raises ValueError when the weights to normalise by add up to zero.
    """
    weights = weighted(tensors, weights)
    total = sum(weights) if normalize else 1.0
    if total == 0:
        raise ValueError(f"the weights {weights} add up to 0: they cannot be normalised, use normalize=False")
    return (sum(w * wide(t) for w, t in zip(weights, tensors, strict=True)) / total).to(tensors[0].dtype)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at share `t` (0 = a, 1 = b) of the arc from `a` to `b`; same shape and dtype as `a`.

    The whole tensor is one vector. Within about 1.8 degrees of parallel or opposite, or where one is zero, the arc is
    undefined or a line: linear interpolation. Fine-tunes of one base are usually that close, so for them SLERP is
    LERP. (mergekit 0.1.5 takes a zero tensor for orthogonal to everything: sin(t pi/2) b instead of t b.)
    Computed in fp64: towards opposite vectors 1/sin(W) magnifies the rounding of the cosine.
    Raises ValueError for different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}: both tensors need the same shape")
    x, y = a.double(), b.double()
    from_a, from_b = arc((x * y).sum().item(), x.norm().item() * y.norm().item(), t)
    return (from_a * x + from_b * y).to(a.dtype)


def arc(dot: float, norms: float, t: float) -> tuple[float, float]:
    """How much of `a` and of `b` makes the point at share t; dot: a . b, norms: |a| |b|."""
    if norms == 0 or abs(dot / norms) > NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(dot / norms)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def task_vector(finetuned: Tensor, base: Tensor) -> Tensor:
    """tau = theta_ft - theta_base: what fine-tuning changed, in fp32 (the difference of two bf16 weights is exact)."""
    weighted([finetuned, base], None)
    return wide(finetuned) - wide(base)


def task_arithmetic(task_vectors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """sum_i w_i tau_i (None: all 1): add skills with positive weights, take one out with a negative weight."""
    weights = weighted(task_vectors, weights)
    return sum(w * wide(tau) for w, tau in zip(weights, task_vectors, strict=True))


def apply(base: Tensor, task_vector: Tensor, lam: float = 1.0) -> Tensor:
    """theta_base + lam * tau, added in fp32 and rounded once to the dtype of `base`."""
    weighted([base, task_vector], None)
    return (wide(base) + lam * wide(task_vector)).to(base.dtype)
