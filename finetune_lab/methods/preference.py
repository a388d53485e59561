"""Direct preference optimisation: prefer the chosen answer over the rejected one, measured against a reference.

What: log-probabilities of answers, and the DPO loss on them.
Paper: Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290), eq. 7.
Formula: -log sigmoid(beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)]); the loss sees only this
difference, so it can fall while the chosen answer becomes less likely: watch both rewards.
Leaves out: IPO, KTO, ORPO, SimPO; label smoothing; the trick of one model with its adapter off as the reference.
In production: `trl.DPOTrainer`.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed log-probability of the labelled tokens of each row, fp32, (batch,).

    logits: (batch, seq, vocab); labels: (batch, seq), -100 at the prompt and the padding, not shifted.
    """
    scores, targets = logits[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return -losses.sum(1)


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO loss of a batch of pairs and the implicit rewards that it compares.

    All four: (batch,) summed log-probabilities of the answers. beta: how far the policy may move (0.1 is common).
    Returns (mean loss, chosen rewards, rejected rewards); the rewards, (batch,), are detached, for watching.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected).mean(), chosen.detach(), rejected.detach()
