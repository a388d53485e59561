"""What to watch while a preference loss falls: the rewards that the policy itself implies.

Paper: DPO 2305.18290, section 4: r(x, y) = beta log (pi(y|x) / ref(y|x)) + beta log Z(x); Z cancels between two answers
to one prompt. Leaves out: rewards of a trained reward model. In production: `rewards/*` in the logs of `trl.DPOTrainer`.
"""

import torch
from torch import Tensor


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """beta * (log pi - log ref) of each answer, (batch,): the reward up to a constant for each prompt."""
    return beta * (policy - reference)


def reward_margins(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Reward of the chosen answer minus that of the rejected one, (batch,)."""
    return chosen - rejected


def reward_accuracy(chosen: Tensor, rejected: Tensor, tie: float = 0.0) -> Tensor:
    """Share of pairs whose chosen answer has the higher reward, a scalar; a margin of at most `tie` counts one half.

    Before the first step all rewards are 0, so this starts at one half; TRL counts a tie as wrong and starts at 0. Where
    the reference was computed in other batches, rounding (1e-5) breaks the ties at random: give a small `tie`.
    """
    margin = chosen - rejected
    return torch.where(margin.abs() <= tie, 0.5, (margin > 0).float()).mean()
