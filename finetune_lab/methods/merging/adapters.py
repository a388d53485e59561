"""Merging LoRA adapters: what is to be added up are the updates s B A, not the factors A and B.

Papers: Hu et al. 2021 (arXiv 2106.09685): dW = s B A. The sum of updates is again a product, of rank sum_i r_i:
    sum_i w_i s_i B_i A_i = [B_1 ... B_n] [w_1 s_1 A_1; ...; w_n s_n A_n]                  (`concatenate`: exact)
and its best approximation of a smaller rank is its truncated SVD (Eckart and Young 1936; `svd`). But
    (sum_i B_i)(sum_j A_j) = sum_i B_i A_i + sum_{i != j} B_i A_j: cross terms that nobody trained  (`linear_factors`)
Leaves out: adapters on embeddings and convolutions, DoRA magnitudes, biases. One layer at a time, in fp32.
In production: peft's `add_weighted_adapter`, combination_type "cat", "svd" and "linear" (the trap).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finetune_lab.methods.merging.linear import wide


class Adapter(NamedTuple):
    """The update scaling * B A of one linear layer: A (r, in), B (out, r), scaling alpha/r (rsLoRA: alpha/sqrt(r))."""

    A: Tensor
    B: Tensor
    scaling: float = 1.0


def update(adapter: Adapter) -> Tensor:
    """scaling * B A, shape (out, in), fp32: what merging the adapter adds to the frozen weight."""
    return adapter.scaling * (wide(adapter.B) @ wide(adapter.A))


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """The exact weighted sum of the updates as one adapter of rank sum_i r_i; its scaling is 1."""
    weights = per_adapter(adapters, weights)
    A = torch.cat([w * a.scaling * wide(a.A) for w, a in zip(weights, adapters, strict=True)])
    return Adapter(A, torch.cat([wide(a.B) for a in adapters], dim=1))


def svd(adapters: Sequence[Adapter], weights: Sequence[float] | None = None, rank: int | None = None) -> Adapter:
    """The best adapter of rank `rank` (None: the largest of theirs) for the weighted sum of the updates.

    Never makes the (out, in) matrix: with B = Q_b R_b and A^T = Q_a R_a (QR), the singular values of B A are those
    of the small R_b R_a^T. The thin factors are decomposed in fp64, which costs little: in fp32 the rounding alone is
    1e-6 of the update. Otherwise peft's SVD of the dense update: B = U S, A = V^T.
    """
    A, B, _ = concatenate(adapters, weights)
    rank = max(len(a.A) for a in adapters) if rank is None else rank
    Q_b, R_b = torch.linalg.qr(B.double())
    Q_a, R_a = torch.linalg.qr(A.T.double())
    small = factorize(R_b @ R_a.T, rank)
    return Adapter((small.A @ Q_a.T).to(A.dtype), (Q_b @ small.B).to(B.dtype))


def factorize(update: Tensor, rank: int) -> Adapter:
    """The best approximation of an (out, in) update by an adapter of rank `rank`: B = U S, A = V^T, scaling 1.

    For updates that are no longer a sum of few products, such as `ties` of updates (peft's "ties_svd").
    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}: the rank must be a whole number of at least 1")
    U, S, Vh = torch.linalg.svd(wide(update), full_matrices=False)
    return Adapter(Vh[:rank], U[:, :rank] * S[:rank])


def linear_factors(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """The trap: A = sum_i +-sqrt(|w_i s_i|) A_i and B = sum_i sqrt(|w_i s_i|) B_i, as peft's "linear" does.

    Cheap and of the old rank, but its update has the cross terms B_i A_j of adapters that never met. All ranks must
    be equal (ValueError). Exact only for one adapter.
    """
    weights = per_adapter(adapters, weights)
    if len({len(a.A) for a in adapters}) > 1:
        ranks = ", ".join(str(len(a.A)) for a in adapters)
        raise ValueError(f"ranks {ranks}: factors of unequal rank cannot be added, use concatenate or svd")
    roots = [math.sqrt(abs(w * a.scaling)) for w, a in zip(weights, adapters, strict=True)]
    signs = [math.copysign(1, w * a.scaling) for w, a in zip(weights, adapters, strict=True)]
    A = sum(sign * root * wide(a.A) for sign, root, a in zip(signs, roots, adapters, strict=True))
    return Adapter(A, sum(root * wide(a.B) for root, a in zip(roots, adapters, strict=True)))


def per_adapter(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    """One weight per adapter (None: all 1). Raises ValueError for other counts, no adapters or layers of unequal size."""
    if not adapters:
        raise ValueError("no adapters were given: a merge needs at least one")
    sizes = {(a.B.shape[0], a.A.shape[1]) for a in adapters}
    if len(sizes) > 1:
        raise ValueError(f"updates of sizes {sorted(sizes)}: all adapters must belong to one layer")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters: give one weight per adapter")
    return weights
