"""KTO: learn from single answers with a thumb up or down, no pairs.

Paper: Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization (arXiv 2402.01306), section 4.
Formula: r = log pi(y|x) - log ref(y|x) of the sample; v = lambda_D sigmoid(beta (r - z0)) for a good answer,
lambda_U sigmoid(beta (z0 - r)) for a bad one; loss = E[lambda_y - v]. z0 is how far the policy has drifted on average:
a gain counts from there, as a person counts gains from what she has (Kahneman and Tversky).
Leaves out: APO, BCO. In production: `trl.KTOTrainer`.
"""

import torch
from torch import Tensor


def kto_reference_point(policy_mismatched: Tensor, reference_mismatched: Tensor) -> Tensor:
    """z0: the estimate of KL(pi || ref) from mismatched pairs, (x_i+1, y_i), a scalar without gradient, at least 0.

    Both: (batch,) summed log-probabilities of each answer under the NEXT row's prompt: answers nobody asked for there.
    It is the mean log-ratio, clamped at 0 (the paper's estimate and TRL's). Biased, and cheap: no sampling.
    """
    return (policy_mismatched - reference_mismatched).mean().clamp(min=0).detach()


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    z0: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean of lambda_y - v over the batch, and the rewards beta * (log pi - log ref), detached, (batch,).

    policy, reference: (batch,) summed log-probabilities of the answers; desirable: bool (batch,).
    The weights are lambda_D and lambda_U: with few thumbs down raise theirs, so that both sides weigh alike.
    """
    ratio = policy - reference
    gain = torch.where(desirable, ratio - z0, z0 - ratio)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return (weight * (1 - torch.sigmoid(beta * gain))).mean(), beta * ratio.detach()
