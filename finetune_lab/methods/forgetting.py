"""Elastic weight consolidation: move freely where the old task does not care, hardly where it does.

What: the quadratic penalty that holds each parameter near its old value, as stiffly as the old task needs it.
Paper: Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks (arXiv 1612.00796), eq. 3.
Formula: lambda / 2 * sum_i F_i * (theta_i - theta*_i)^2, F = diagonal of the Fisher information at theta*.
Leaves out: how to estimate F; several old tasks (add their penalties).
In production: no common library has it; replay of old data is the usual choice.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters of `model` by name, as copies that no later step changes: theta* of the formula."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def ewc_penalty(
    parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor], strength: float
) -> Tensor:
    """The penalty to add to the new task's loss; a scalar in fp32, differentiable in `parameters` only.

    parameters, anchor, fisher: tensors by name, the names of `anchor`; equal shapes. strength: lambda of the formula;
    a Fisher of mean log-likelihoods is small, so values of 100 to 10,000 are common.
    Raises ValueError when a name of `anchor` is missing elsewhere.
    """
    missing = sorted(name for name in anchor if name not in parameters or name not in fisher)
    if missing:
        raise ValueError(f"no parameter or Fisher called {missing[0]!r}: give all three the names of the anchor")
    total = torch.zeros(())
    for name, old in anchor.items():
        distance = (parameters[name] - old.detach()).float()
        total = total + (fisher[name].detach().float() * distance**2).sum()
    return strength / 2 * total
