"""Formulas of losses, merges and scores at a single point, for checking by hand what the tensor versions compute.

Papers: DPO 2305.18290, IPO 2310.12036, SimPO 2405.14734, KTO 2402.01306, GRPO 2402.03300, rsLoRA 2312.03732, NEFTune 2310.05914, DARE 2311.03099,
TIES 2306.01708. Plain floats, no torch. Leaves out: batches, masks, gradients. In production: trl and mergekit.
"""

import math
from collections.abc import Sequence


def pairwise_loss(margin: float) -> float:
    """-log sigmoid(margin): the reward model's loss (Bradley-Terry) when chosen leads rejected by `margin`."""
    return math.log1p(math.exp(-margin)) if margin >= 0 else math.log1p(math.exp(margin)) - margin


def dpo_loss(chosen_logratio: float, rejected_logratio: float, beta: float) -> float:
    """DPO eq. 7; a log-ratio is log pi(y|x) - log pi_ref(y|x), summed over the answer's tokens."""
    return pairwise_loss(beta * (chosen_logratio - rejected_logratio))


def ipo_loss(chosen_logratio: float, rejected_logratio: float, beta: float) -> float:
    """IPO eq. 17 with tau = beta: the squared distance of the difference of log-ratios from 1 / (2 beta)."""
    return (chosen_logratio - rejected_logratio - 1 / (2 * beta)) ** 2


def simpo_loss(chosen_mean: float, rejected_mean: float, beta: float, gamma: float) -> float:
    """SimPO eq. 6 from log-probabilities averaged over each answer's tokens; gamma stands outside beta."""
    return pairwise_loss(beta * (chosen_mean - rejected_mean) - gamma)


def kto_loss(logratio: float, z0: float, beta: float, good: bool) -> float:
    """KTO of one answer with weights 1: 1 - sigmoid(beta (logratio - z0)) if good, 1 - sigmoid(beta (z0 - logratio)) if not."""
    gain = beta * (logratio - z0 if good else z0 - logratio)
    return 1 - math.exp(-pairwise_loss(gain))


def noisy_margin(flipped: float, beta: float) -> float:
    """Margin of log-ratios at which DPO's expected loss is least when a share `flipped`, in (0, 0.5), of labels is wrong."""
    return math.log((1 - flipped) / flipped) / beta


def least_kl(share: float, start: float) -> float:
    """The least KL, in nats, at which a policy can have `share` good answers when the reference has `start`, in (0, 1).

    Reached by moving probability from bad answers to good ones and nothing else (data processing inequality).
    """
    parts = ((share, start), (1 - share, 1 - start))
    return sum(new * math.log(new / old) for new, old in parts if new > 0)


def grpo_success_advantage(successes: int, group: int) -> float:
    """Advantage of a right answer for 0/1 rewards: (1 - mean) / std with the n - 1 divisor, as in trl; epsilon left out.

    Raises ValueError unless some, but not all, of the group succeed: otherwise every advantage is zero.
    """
    if not 0 < successes < group:
        raise ValueError(f"{successes} successes of {group}: with equal rewards the group carries no signal")
    mean = successes / group
    variance = (successes * (1 - mean) ** 2 + (group - successes) * mean**2) / (group - 1)
    return (1 - mean) / math.sqrt(variance)


def lora_scaling(alpha: float, rank: int) -> float:
    """alpha / r, the factor in front of B A (peft: LoraLayer.scaling)."""
    return alpha / rank


def rslora_scaling(alpha: float, rank: int) -> float:
    """alpha / sqrt(r) (peft: LoraConfig(use_rslora=True))."""
    return alpha / math.sqrt(rank)


def neftune_bound(alpha: float, length: int, width: int) -> float:
    """Noise is uniform in [-bound, bound], bound = alpha / sqrt(length * width); its std is bound / sqrt(3)."""
    return alpha / math.sqrt(length * width)


def dare_rescale(drop: float) -> float:
    """Factor for the surviving changes when a share `drop` (0 to 1) is dropped: 1 / (1 - drop).

    Raises ValueError outside [0, 1), for example for a percentage.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop is {drop}: give a share from 0 to below 1, 0.9 for 90 %")
    return 1 / (1 - drop)


def dare_noise_factor(drop: float) -> float:
    """Growth of a change's root mean square under DARE: sqrt(1 / (1 - drop)). The mean stays."""
    return math.sqrt(dare_rescale(drop))


def dare_collision(drop: float, models: int) -> float:
    """Probability that two or more of `models` independent task vectors keep the same position."""
    keep = 1 - drop
    return 1 - drop**models - models * keep * drop ** (models - 1)


def ties_element(values: Sequence[float]) -> float:
    """One position of TIES after trimming: sign of the SUM of values, then the mean of those that agree with it."""
    elected = sum(values)
    agreeing = [value for value in values if value * elected > 0]
    return sum(agreeing) / len(agreeing) if agreeing else 0.0


def slerp_weight(cosine: float, t: float) -> float:
    """Weight of the first vector, sin((1 - t) omega) / sin(omega); 1 - t for parallel vectors (the limit)."""
    omega = math.acos(max(-1.0, min(1.0, cosine)))
    return 1 - t if math.sin(omega) == 0 else math.sin((1 - t) * omega) / math.sin(omega)


def window_token_mean(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """Token mean of an accumulation window from each micro-batch's mean loss and number of counted tokens."""
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def accuracy_half_width(accuracy: float, items: int, z: float = 1.96) -> float:
    """Half of the 95 % interval of a share measured on independent items, normal approximation."""
    return z * math.sqrt(accuracy * (1 - accuracy) / items)


def random_code_floor(codes: int, tokens: int) -> float:
    """Mean loss a token (nats) that is left when all of an answer is certain except which of `codes` equal codes it is."""
    return math.log(codes) / tokens
