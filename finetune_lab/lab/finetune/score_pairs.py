"""Scores of preference training on held-out rows: are good answers told from bad ones, and what does the model say?

    accuracy      share of pairs whose chosen answer has the higher implicit reward beta * (log pi - log ref); 1/2 before
                  training, by definition. With labels instead of pairs: of all (good, bad) combinations
    margin        mean reward of the good answers minus that of the bad ones
    chosen_logp, rejected_logp      mean log-probability of an answer: when both fall, likelihood moved elsewhere
    likelier      share of pairs whose chosen answer the model finds likelier as it is, without a reference
    words         mean length of the answers: a model that learnt length shows it here
    good          task reply: share of sampled answers without a fault, by the rule of `tasks.reply_faults`

Leaves out: judges, win rates of two models (lesson 06), benchmarks. In production: `trl` logs the first three on batches.
"""

import statistics
from collections.abc import Sequence

import torch

from finetune_lab.lab import tasks
from finetune_lab.lab.finetune.pairs import Pair, Rated
from finetune_lab.lab.finetune.score import answer_logps, said_to
from finetune_lab.methods.preference import implicit_rewards, reward_accuracy

MEANING = {
    "good": "share of answers that keep the shop's rule: courteous, short, nothing invented, the customer's wish named",
    "accuracy": "share of pairs whose better answer has the higher reward, beta (log pi - log ref); 50 % before training",
    "margin": "mean reward of the better answers minus that of the others",
    "likelier": "share of pairs whose better answer the model finds likelier as it is, without a reference",
    "words": "words in an answer, on average",
}


def score(
    model,
    tokenizer,
    rows: Sequence[dict],
    examples: Sequence[Pair | Rated],
    *,
    task: str | None,
    beta: float,
    before: dict | None,
) -> dict:
    """{"scores", "answers", "good", "bad"}; the last two are log-probabilities, the reference of the next call.

    before: what this function gave for the untrained model; None for that model itself.
    """
    said = said_to(model, tokenizer, rows, task)
    figures = tasks.score(task, said, list(rows)) if task else {}
    figures["words"] = statistics.mean(len(text.split()) for text in said)
    good, bad = (answer_logps(model, side) for side in sides(examples))
    if good and bad:
        figures |= compared(good, bad, before, beta, paired=isinstance(examples[0], Pair))
    return {"scores": figures, "answers": said, "good": good, "bad": bad}


def sides(examples: Sequence[Pair | Rated]) -> tuple[list, list]:
    """(the good answers, the bad answers)."""
    if isinstance(examples[0], Pair):
        return [e.chosen for e in examples], [e.rejected for e in examples]
    return [e for e in examples if e.good], [e for e in examples if not e.good]


def compared(good: list[float], bad: list[float], before: dict | None, beta: float, *, paired: bool) -> dict:
    """Scores from summed log-probabilities of answers (nats)."""
    good, bad = torch.tensor(good, dtype=torch.float64), torch.tensor(bad, dtype=torch.float64)
    means = {"chosen_logp": good.mean().item(), "rejected_logp": bad.mean().item()}
    if before is None:
        return {"accuracy": 0.5, "likelier": share(good, bad, paired), "margin": 0.0, **means}
    rewards = [implicit_rewards(now, torch.tensor(then, dtype=torch.float64), beta)
               for now, then in ((good, before["good"]), (bad, before["bad"]))]  # fmt: skip
    margin = (rewards[0].mean() - rewards[1].mean()).item()
    return {"accuracy": share(*rewards, paired), "likelier": share(good, bad, paired), "margin": margin, **means}


def share(good: torch.Tensor, bad: torch.Tensor, paired: bool) -> float:
    """Share of (good, bad) where good is larger, a tie counts half: pair by pair, or all combinations."""
    if not paired:
        good, bad = (t.flatten() for t in torch.broadcast_tensors(good[:, None], bad[None, :]))
    return reward_accuracy(good, bad, tie=0.5).item()
