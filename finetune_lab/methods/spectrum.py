"""What a fine-tune did to one matrix, read from its singular values and from its rows.

Papers: Aghajanyan et al. 2020, arXiv 2012.13255 (fine-tuning moves in few directions); Shuttleworth et al. 2024,
arXiv 2410.21228 (intruder dimensions: high-ranking singular vectors of W that W0 has none like); Liu et al. 2024,
arXiv 2402.09353, section 3.2 (how much magnitude and direction change).
Leaves out: whole models (call these matrix by matrix), and taking intruders away again.
In production: `peft.tuners.lora.intruders.reduce_intruder_dimension`.
"""

import torch
from torch import Tensor


def energy(update: Tensor) -> Tensor:
    """Share of ||update||^2 that its k strongest directions hold, for k = 1, 2, ...: (min(out, in),), rising to 1.

    update: (out, in), any float type; computed in fp32. The squares of the singular values add up to the squared
    Frobenius norm. All zeros give nan.
    """
    squares = torch.linalg.svdvals(update.float()).square()
    return squares.cumsum(0) / squares.sum()


def energy_rank(update: Tensor, share: float = 0.9) -> int:
    """The smallest rank that holds `share` (0 to 1) of the squared norm of `update` (out, in)."""
    return min(int((energy(update) < share).sum()) + 1, min(update.shape))


def intruder_dimensions(before: Tensor, after: Tensor, k: int = 10, threshold: float = 0.5) -> int:
    """How many of the k strongest left singular vectors of `after` are like none of `before`: |cosine| < threshold.

    before, after: (out, in), any float type; the SVDs are done in fp32. Compared with all vectors of `before`, as in
    algorithm 1 of the paper and in peft, whose defaults these are.
    """
    old = torch.linalg.svd(before.float(), full_matrices=False).U
    new = torch.linalg.svd(after.float(), full_matrices=False).U[:, :k]
    likeness = (new.T @ old).abs().amax(dim=1)
    return int((likeness < threshold).sum())


def magnitude_and_direction_change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """(dM, dD) of one matrix (out, in): how far its row norms moved, and how far its rows turned, both as means.

    dM = mean | ||w'|| - ||w|| |, dD = mean (1 - cos(w', w)) over the rows w: equations 3 and 4 of the DoRA paper.
    The rows of (out, in) are the paper's columns.
    """
    before, after = before.double(), after.double()  # 1 - cos of a small step needs the digits
    moved = (after.norm(dim=1) - before.norm(dim=1)).abs().mean()
    turned = (1 - torch.cosine_similarity(after, before, dim=1)).mean()
    return moved.item(), turned.item()
