"""TIES: keep each task vector's largest entries, elect a sign per entry, average the entries that agree with it.

Paper: Yadav et al. 2023, TIES-Merging (TrIm, Elect Sign & Merge; arXiv 2306.01708), section 4.2 and algorithm 1:
    1. trim:   tau^_t = tau_t * [|tau_t| among its k % largest]        3. merge: tau_m = mean of the tau^_t whose
    2. elect:  gamma = sgn(sum_t tau^_t), the sum of VALUES               sign is gamma, entry by entry
    theta = theta_base + lam * tau_m
The paper has no weights per model; peft and mergekit each added them in their own way: three algorithms
(`ties`; `ties_merge` is the paper's alone).
Leaves out: trimming over a whole model, as the paper's code does (pass one flattened vector to get it; libraries trim
tensor by tensor). An entry whose sum is exactly 0 elects plus, as in peft and mergekit; the paper leaves that open.
In production: mergekit's `ties`, `peft.utils.merge_utils.ties`. The fast form for large tensors is in `stream`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from finetune_lab.methods.merging.linear import weighted, wide


def trim(task_vector: Tensor, density: float) -> Tensor:
    """Keep the share `density` (0 to 1) of the entries that is largest in magnitude, with its signs; zero the rest.

    int(density * n) entries stay; of equal magnitudes, those that come first in memory (libraries leave that open).
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, expected a share above 0 and at most 1 (20 % is 0.2)")
    k = int(density * task_vector.numel())
    kept = task_vector.abs().flatten().argsort(descending=True, stable=True)[:k]
    mask = torch.zeros(task_vector.numel(), dtype=torch.bool, device=task_vector.device)
    mask[kept] = True
    return task_vector * mask.view_as(task_vector)


def keep_largest(task_vector: Tensor, k: int) -> Tensor:
    """The same entries as `trim` for a given number of them, several times faster: it sorts no more than it must."""
    if k == 0:
        return torch.zeros_like(task_vector)
    magnitude = task_vector.abs().flatten()
    threshold = magnitude.topk(k).values[-1]
    keep, equal = magnitude > threshold, magnitude == threshold
    keep |= equal & (equal.cumsum(0) <= k - keep.sum())
    return task_vector * keep.view_as(task_vector)


def elect_sign(task_vectors: Tensor) -> Tensor:
    """The sign of each entry's SUM over the models: +1 or -1, never a count of votes; a sum of 0 elects plus.

    task_vectors: (models, ...), trimmed. One large change outvotes two small ones: (1.0, -0.3, -0.3) elects plus.
    """
    return torch.where(task_vectors.sum(0) >= 0, 1, -1)


def disjoint_mean(task_vectors: Tensor, sign: Tensor) -> Tensor:
    """Mean over the models that agree with the elected sign, entry by entry; 0 where none does.

    task_vectors: (models, ...); a trimmed (zero) entry agrees with nobody and is not counted.
    """
    agrees = task_vectors.sign() == sign
    return (task_vectors * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def ties_merge(task_vectors: Sequence[Tensor], density: float) -> Tensor:
    """The paper's TIES in two lines: trim each task vector, elect signs, average what agrees. One task vector."""
    trimmed = torch.stack([trim(tau, density) for tau in task_vectors])
    return disjoint_mean(trimmed, elect_sign(trimmed))


def ties(
    task_vectors: Sequence[Tensor],
    density: float,
    weights: Sequence[float] | None = None,
    convention: str = "paper",
) -> Tensor:
    """TIES with a weight per model, after one of three conventions. Then `apply(base, tau_m, lam)`.

    task_vectors: equal shapes, fp32; density: share kept of each, in (0, 1] (the paper: 0.2); weights: one per model.
    convention, with t over the models that agree with the elected sign (for weights of 1 all three are equal):
        paper    sign of sum tau^_t;      mean of tau^_t                      no weights
        peft     sign of sum tau^_t;      sum w_t tau^_t / number of t        `peft.utils.merge_utils.ties`
        mergekit sign of sum w_t tau^_t;  sum w_t tau^_t / sum of these w_t   mergekit's `ties`; at least one is kept
    Raises ValueError for another convention, a density outside (0, 1], or weights with the paper's convention.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, expected a share above 0 and at most 1 (20 % is 0.2)")
    n = task_vectors[0].numel() if len(task_vectors) else 0
    k = int(density * n)
    k = max(1, k) if convention == "mergekit" and n else k
    return consensus([keep_largest(wide(tau), k) for tau in task_vectors], weights, convention)


def consensus(trimmed: Sequence[Tensor], weights: Sequence[float] | None, convention: str) -> Tensor:
    """Steps 2 and 3 of `ties` on task vectors that are trimmed already, or dropped and rescaled by DARE."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}: choose one of {', '.join(CONVENTIONS)}")
    if convention == "paper" and weights is not None:
        raise ValueError("the paper's TIES has no weights per model: leave them out, or choose convention='mergekit'")
    w = weighted(trimmed, weights)
    stacked = torch.stack(list(trimmed))
    return CONVENTIONS[convention](stacked, stacked.new_tensor(w).view(-1, *[1] * (stacked.dim() - 1)))


def _paper(trimmed: Tensor, w: Tensor) -> Tensor:
    return disjoint_mean(trimmed, elect_sign(trimmed))


def _peft(trimmed: Tensor, w: Tensor) -> Tensor:
    agrees = trimmed.sign() == elect_sign(trimmed)
    return (w * trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _mergekit(trimmed: Tensor, w: Tensor) -> Tensor:
    agrees = (w * trimmed).sign() == elect_sign(w * trimmed)
    total = (w * agrees).sum(0)
    return (w * trimmed * agrees).sum(0) / torch.where(total == 0, 1, total)


CONVENTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"paper": _paper, "peft": _peft, "mergekit": _mergekit}


def sign_conflicts(task_vectors: Sequence[Tensor] | Tensor) -> float:
    """Share of the changed entries that one model moves up and another down; nan where nothing changed."""
    stacked = torch.stack(list(task_vectors))
    up, down = (stacked > 0).any(0), (stacked < 0).any(0)
    return ((up & down).sum() / (up | down).sum()).item()
