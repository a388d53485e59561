"""Where preference training ends: the best policy under a reward and a leash, in closed form.

What: the objective of RLHF and its optimum, for one prompt with a finite set of answers, so that both can be enumerated.
Paper: DPO 2305.18290, eqs. 3 and 4.
Formula: max over pi of E_pi[r] - beta KL(pi || ref) is reached at pi*(y) = ref(y) exp(r(y) / beta) / Z.
Leaves out: sequences, where Z is a sum over all texts: that sum is what DPO never needs.
"""

import torch
from torch import Tensor


def kl_optimum(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """pi*(y) = ref(y) exp(r(y) / beta) / Z, (n,). reference: (n,) probabilities; reward: (n,); beta > 0."""
    return torch.softmax(reference.log() + reward / beta, dim=-1)


def kl_objective(policy: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """E_pi[r] - beta KL(pi || ref), a scalar. policy, reference: (n,) probabilities; an answer of probability 0 adds 0."""
    kl = (torch.xlogy(policy, policy) - torch.xlogy(policy, reference)).sum(-1)
    return (policy * reward).sum(-1) - beta * kl


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the summed distance of two distributions (n,): the most that they differ on any event, 0 to 1."""
    return 0.5 * (p - q).abs().sum(-1)
