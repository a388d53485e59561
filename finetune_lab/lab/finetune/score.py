"""Scores of a model on held-out rows: does it say the right thing, and how surprised is it by the reference?

`exact_match` compares greedy answers with the last assistant turn; tasks of the course bring their own metric.
`loss` is nats a token over the tokens that count, all rows together (not the mean of batches). Leaves out: judges,
benchmarks (lesson 14). In production: lm-evaluation-harness.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from finetune_lab.lab import tasks
from finetune_lab.lab.evaluate import LONGEST_ANSWER
from finetune_lab.lab.finetune.encode import Example
from finetune_lab.lab.finetune.talk import answers
from finetune_lab.methods.metrics import exact_match

LOGIT_BYTES = 200_000_000  # how much the logits of one batch may take


def asked(row: dict) -> list[dict]:
    """The turns that the model is given in a row."""
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def reference(row: dict) -> str:
    """The answer that a row holds."""
    return (row["completion"] if "completion" in row else row["messages"])[-1]["content"]


def score(
    model, tokenizer, rows: Sequence[dict], examples: Sequence[Example], task: str | None
) -> tuple[dict, list[str]]:
    """(scores, greedy answers) on held-out rows; `examples` are the same rows with their labels, for the loss."""
    longest = LONGEST_ANSWER.get(task) or _longest(tokenizer, rows)
    said = answers(model, tokenizer, [asked(row) for row in rows], max_new_tokens=longest)
    if task:
        figures = tasks.score(task, said, list(rows))
    else:
        figures = {"exact_match": exact_match(said, [reference(row) for row in rows])}
    return figures | {"loss": held_out_loss(model, examples)}, said


def _longest(tokenizer, rows: Sequence[dict], most: int = 512) -> int:
    """A quarter more than the longest reference answer, in tokens."""
    longest = max(len(tokenizer.encode(reference(row), add_special_tokens=False)) for row in rows)
    return min(most, longest + longest // 4 + 4)


@torch.no_grad()
def held_out_loss(model, examples: Sequence[Example]) -> float | None:
    """Mean negative log likelihood (nats) of a token that counts; None when nothing counts."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    rows = sorted((e for e in examples if e.counted), key=lambda e: len(e.ids))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    while rows:
        size = max(1, min(16, LOGIT_BYTES // (len(rows[-1].ids) * vocabulary * 4)))
        chosen, rows = rows[-size:], rows[:-size]
        width = len(chosen[-1].ids)
        ids = torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in chosen], device=model.device)
        mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in chosen], device=model.device)
        labels = torch.tensor([e.labels + [-100] * (width - len(e.ids)) for e in chosen], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    model.train(training)
    return total / count if count else None
