"""A policy small enough to enumerate: one prompt, n answers, n numbers. Any pair loss can be trained to its end.

What: full-batch training over all pairs (i, j) of answers, each weighted by how often i is preferred over j.
Here the optimum is known (`methods.preference.kl_optimum`), so a loss can be held against what it promises.
Leaves out: sequences and sampling: the loss seen here is the expected one. See DPO 2305.18290, section 4.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def all_pairs(prefer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen index, rejected index, weight of every ordered pair that can occur, (m,) each; the weights sum to 1.

    prefer: (n, n), the probability that answer i is preferred over answer j; the diagonal does not count.
    """
    chosen, rejected = (prefer * (1 - torch.eye(len(prefer)))).nonzero(as_tuple=True)
    weight = prefer[chosen, rejected]
    return chosen, rejected, weight / weight.sum()


def train(reference: Tensor, prefer: Tensor, loss: Callable, *, steps: int = 500, lr: float = 0.1) -> dict:
    """Train n logits from the reference on all pairs; returns `policy`, (n,) probabilities, and `margins`, a list.

    reference: (n,) probabilities. loss: (policy_chosen, policy_rejected, reference_chosen, reference_rejected) -> a
    tuple whose first entry is the mean loss, as in `methods.preference.pairs`. margins: after each step, the mean of
    log-ratio(chosen) - log-ratio(rejected), without beta. Adam, one step for the whole set of pairs.
    """
    chosen, rejected, weight = all_pairs(prefer)
    past = reference.log()
    each_pair = torch.vmap(lambda *logps: loss(*logps)[0])
    logits = past.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    margins = []
    for _ in range(steps):
        logps = logits.log_softmax(-1)
        losses = each_pair(logps[chosen], logps[rejected], past[chosen], past[rejected])
        optimizer.zero_grad()
        (weight * losses).sum().backward()
        optimizer.step()
        ratio = logits.detach().log_softmax(-1) - past
        margins.append((weight * (ratio[chosen] - ratio[rejected])).sum().item())
    return {"policy": logits.detach().softmax(-1), "margins": margins}
