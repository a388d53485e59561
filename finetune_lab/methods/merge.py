"""Merging models without training: on the sphere (SLERP), and by task vectors that agree (TIES).

What: two models become one that lies between them; many fine-tunes of one base become one.
Papers: Shoemake 1985, Animating Rotation with Quaternion Curves (SLERP); Yadav et al. 2023, TIES-Merging
(arXiv 2306.01708), algorithm 1.
Formula: slerp_t(a, b) = sin((1-t) w)/sin(w) a + sin(t w)/sin(w) b, w = angle between a and b;
TIES: keep each task vector's largest entries, elect the sign of their SUM, average the entries that agree with it.
Leaves out: weights per model (paper, peft and mergekit differ there), DARE, whole checkpoints.
In production: mergekit; for adapters `peft.utils.merge_utils`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at share `t` (0 = a, 1 = b) of the arc from `a` to `b`; same shape and dtype as `a`.

    The whole tensor is one vector. Within about 1.8 degrees of parallel or opposite (|cos| > 0.9995), or where one
    is zero, the arc is undefined or a line: linear interpolation, as in mergekit. Fine-tunes of one base are usually
    that close, so for them SLERP is LERP. Raises ValueError for different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}: both tensors need the same shape")
    x, y = a.float(), b.float()
    norms = x.norm() * y.norm()
    cosine = (x * y).sum() / norms
    if norms == 0 or cosine.abs() > 0.9995:
        return ((1 - t) * x + t * y).to(a.dtype)
    angle = torch.arccos(cosine)
    return ((torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)).to(a.dtype)


def trim(task_vector: Tensor, density: float) -> Tensor:
    """Keep the share `density` (0 to 1) of the entries that is largest in magnitude, with its signs; zero the rest."""
    kept = task_vector.abs().flatten().topk(int(density * task_vector.numel())).indices
    mask = torch.zeros(task_vector.numel(), dtype=torch.bool, device=task_vector.device)
    mask[kept] = True
    return task_vector * mask.view_as(task_vector)


def ties_merge(task_vectors: Sequence[Tensor], density: float) -> Tensor:
    """One task vector from many: trim each, elect a sign per entry, average those that agree. Zero where none does.

    task_vectors: fine-tuned minus base, equal shapes; density: share of entries kept of each (the paper: 0.2).
    The merged model is base + scale * result, scale near 1. A sum of exactly 0 elects plus.
    Raises ValueError for a density that is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, expected a share above 0 and at most 1 (20 % is 0.2)")
    trimmed = torch.stack([trim(vector, density) for vector in task_vectors])
    elected = torch.where(trimmed.sum(0) >= 0, 1, -1)
    agrees = trimmed.sign() == elected
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
