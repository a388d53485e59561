"""DARE: drop most of a task vector at random, and scale up what is left so that its mean stays.

Paper: Yu et al. 2023, Language Models are Super Mario (arXiv 2311.03099), section 3.2:
    m ~ Bernoulli(p),  tau~ = (1 - m) * tau,  tau^ = tau~ / (1 - p)        p is the DROP rate, a fraction: 0.9, not 90
    E[tau^] = tau, and the variance of an entry is tau^2 p / (1 - p): at p = 0.9 every survivor is 10 times too large.
Sparse task vectors rarely meet; where they do, add them (`dare_linear`) or let TIES decide (`dare_ties`).
mergekit says `density` for 1 - p. It (0.1.5) rescales by the ratio of the L1 norms before and after instead of
1/(1-p): nearly the same for a large tensor, biased for a small one.
Leaves out: the choice of p by magnitude (DELLA).
In production: mergekit's `dare_linear`, `dare_ties`; `peft.utils.merge_utils`. Fast form: `stream`.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from finetune_lab.methods.merging.linear import task_arithmetic, wide
from finetune_lab.methods.merging.ties import consensus

BLOCK = 256  # entries that share one threshold in `random_keep`


def dare(task_vector: Tensor, p: float, generator: Generator | None = None) -> Tensor:
    """Zero each entry with probability `p` and divide the others by 1 - p; shape and dtype stay.

    p: drop rate, from 0 up to but not including 1. generator: seeds the choice; None takes torch's global one.
    Raises ValueError for a p outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"the drop rate p is {p}, expected a fraction from 0 up to, not including, 1 (90 % is 0.9)")
    keep = torch.rand(task_vector.shape, generator=generator, device=task_vector.device) >= p
    return task_vector * keep / (1 - p)


def dare_linear(
    task_vectors: Sequence[Tensor],
    p: float,
    weights: Sequence[float] | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """sum_i w_i dare(tau_i): task arithmetic on dropped and rescaled task vectors."""
    return task_arithmetic([dare(wide(tau), p, generator) for tau in task_vectors], weights)


def dare_ties(
    task_vectors: Sequence[Tensor],
    p: float,
    weights: Sequence[float] | None = None,
    generator: Generator | None = None,
    convention: str = "paper",
) -> Tensor:
    """TIES with DARE in place of the trimming: elect a sign among the survivors, average those that agree.

    Conventions and weights as in `ties.ties`. Raises ValueError like it, and for a p outside [0, 1).
    """
    return consensus([dare(wide(tau), p, generator) for tau in task_vectors], weights, convention)


def random_keep(keep: Tensor, density: float, generator: Generator | None, bits: Tensor) -> Tensor:
    """The fast mask of `stream`: the fp32 buffer `keep`, whole BLOCKs, gets 1.0 with probability `density`, else 0.0.

    Eight random bits decide about an entry: the rarer outcome is theirs if they exceed a threshold. 256 times its
    probability is rounded to a whole number up or down at random, for every block anew, so that the probability of
    each entry is exact; two entries of one block are correlated by less than 1e-4, for densities of 0.05 to 0.95.
    bits: int64, at least len(keep) / 8.
    """
    level = 256 * min(density, 1 - density)
    round_up = torch.rand(len(keep) // BLOCK, 1, generator=generator) < level % 1
    threshold = 127 - int(level) - round_up.to(torch.int8)  # 0 to 128 of the 256 values of an int8 are above it
    draws = bits[: len(keep) // 8].random_(-(2**63), None, generator=generator).view(torch.int8)
    compare = torch.gt if density <= 0.5 else torch.le
    compare(draws.view(-1, BLOCK), threshold, out=keep.view(-1, BLOCK))
    return keep
