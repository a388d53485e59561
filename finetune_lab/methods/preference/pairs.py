"""Losses on pairs of answers: one was preferred. Same shape, different curve over the margin.

What: DPO and its relatives. Each takes log-probabilities (batch,) and returns (mean loss, chosen rewards, rejected
rewards); the rewards are detached, for watching. Bradley and Terry 1952 is the model of preferences behind DPO.
Papers: DPO 2305.18290, cDPO (E. Mitchell's note, 2023), robust DPO 2403.00409, IPO 2310.12036, SLiC-HF 2305.10425,
SimPO 2405.14734, ORPO 2403.07691.
Formula: with the margin h = (log pi - log ref)(chosen) - (log pi - log ref)(rejected), every loss that has a reference
is a function of h alone. It can fall while the chosen answer becomes less likely: watch both rewards.
Leaves out: f-divergences, optimal transport, weighting by the policy. In production: `trl.DPOTrainer`, `trl.experimental`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(reward_1: Tensor, reward_2: Tensor) -> Tensor:
    """Probability that answer 1 is preferred over answer 2: sigmoid(r1 - r2). DPO paper, eq. 1."""
    return torch.sigmoid(reward_1 - reward_2)


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta h): direct preference optimisation. Rafailov et al. 2023, eq. 7; TRL `sigmoid`.

    All four: (batch,) summed log-probabilities of the answers. beta: how far the policy may move (0.1 is common).
    Returns (mean loss, chosen rewards, rejected rewards); the rewards, (batch,), are detached, for watching.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected).mean(), chosen.detach(), rejected.detach()


def cdpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-(1 - epsilon) log sigmoid(beta h) - epsilon log sigmoid(-beta h): conservative DPO, label smoothing.

    epsilon in [0, 0.5): the share of labels believed to be flipped. The loss is least where sigmoid(beta h) = 1 - epsilon,
    so the margin stops. Mitchell 2023, "A note on DPO with noisy preferences". TRL 1.16 has this form for CPO only:
    in `DPOConfig(loss_type="sigmoid")` its `label_smoothing` is read by nobody.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    margin = chosen - rejected
    loss = -(1 - epsilon) * F.logsigmoid(margin) - epsilon * F.logsigmoid(-margin)
    return loss.mean(), chosen.detach(), rejected.detach()


def robust_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """[-(1 - epsilon) log sigmoid(beta h) + epsilon log sigmoid(-beta h)] / (1 - 2 epsilon): DPO unbiased under flips.

    Where a share epsilon in [0, 0.5) of the labels is flipped, its mean is that of `dpo_loss` on the clean labels.
    Chowdhury et al. 2024; TRL `robust`. Raises ValueError for epsilon outside [0, 0.5).
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon is {epsilon}, expected 0 <= epsilon < 0.5: at one half the labels say nothing")
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    margin = chosen - rejected
    loss = (-(1 - epsilon) * F.logsigmoid(margin) + epsilon * F.logsigmoid(-margin)) / (1 - 2 * epsilon)
    return loss.mean(), chosen.detach(), rejected.detach()


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(h - 1/(2 tau))^2: a target for the margin instead of a push without end. Azar et al. 2023, eq. 17; TRL `ipo`.

    All four: (batch,). The paper writes sums; TRL gives log-probabilities averaged over the answer's tokens, as its
    authors do, since a square of sums grows with length: at tau = 0.1 the loss starts at 25 either way.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    loss = (chosen - rejected - 1 / (2 * tau)) ** 2
    return loss.mean(), tau * chosen.detach(), tau * rejected.detach()


def hinge_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """max(0, 1 - beta h): no gradient once the margin is wide enough. SLiC-HF, Zhao et al. 2023; TRL `hinge`.

    All four: (batch,) summed log-probabilities. The paper compares log pi alone and adds an SFT term; with the
    reference inside, as here and in TRL, it is the hinge form of DPO (margin 1/beta).
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return torch.relu(1 - (chosen - rejected)).mean(), chosen.detach(), rejected.detach()


def simpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, beta: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta * (chosen - rejected) - gamma): no reference, length-normalised. Meng et al. 2024, eq. 6.

    Both: (batch,) log-probabilities AVERAGED over the answer's tokens. beta 2 to 10, gamma 0.5 to 1.6: not DPO's 0.1.
    gamma is `simpo_gamma` of `trl.experimental.cpo`, where it appears divided by beta inside beta * (...).
    """
    chosen, rejected = beta * policy_chosen, beta * policy_rejected
    return -F.logsigmoid(chosen - rejected - gamma).mean(), chosen.detach(), rejected.detach()


def orpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, nll: Tensor, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """nll - lam * log sigmoid(log odds ratio): SFT and preference in one stage. Hong et al. 2024, eqs. 6 and 7.

    Both: (batch,) AVERAGED log-probabilities, below 0; odds(p) = p / (1 - p) with p = exp(average). nll: scalar SFT
    loss of the chosen rows (TRL counts prompt and answer). lam: 0.1 in the paper; `beta` of `trl.experimental.orpo`.
    """
    log_odds_chosen = policy_chosen - torch.log(-torch.expm1(policy_chosen))
    log_odds_rejected = policy_rejected - torch.log(-torch.expm1(policy_rejected))
    ratio = -F.logsigmoid(log_odds_chosen - log_odds_rejected).mean()
    return nll + lam * ratio, lam * policy_chosen.detach(), lam * policy_rejected.detach()
