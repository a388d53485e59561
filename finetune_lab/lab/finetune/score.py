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
from finetune_lab.lab.policy import sample
from finetune_lab.methods.metrics import exact_match

LOGIT_BYTES = 200_000_000  # how much the logits of one batch may take


def asked(row: dict) -> list[dict]:
    """The turns that the model is given in a row."""
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def reference(row: dict) -> str:
    """The answer that a row holds: the chosen one of a pair."""
    return next(row[key] for key in ("completion", "chosen", "messages") if key in row)[-1]["content"]


def score(
    model, tokenizer, rows: Sequence[dict], examples: Sequence[Example], task: str | None
) -> tuple[dict, list[str]]:
    """(scores, greedy answers) on held-out rows; `examples` are the same rows with their labels, for the loss."""
    said = said_to(model, tokenizer, rows, task)
    if task:
        figures = tasks.score(task, said, list(rows))
    else:
        figures = {"exact_match": exact_match(said, [reference(row) for row in rows])}
    return figures | {"loss": held_out_loss(model, examples)}, said


def said_to(model, tokenizer, rows: Sequence[dict], task: str | None) -> list[str]:
    """The answer to each row. Greedy, but for task reply, whose letters are sampled at temperature 1 (seed 0): what a
    policy says now and then is what preference training is about, and greedy answers hide it."""
    asks = [asked(row) for row in rows]
    if task == "reply":
        return [texts[0] for texts in sample(model, tokenizer, asks, max_new_tokens=LONGEST_ANSWER[task])]
    longest = LONGEST_ANSWER.get(task) or _longest(tokenizer, rows)
    return answers(model, tokenizer, asks, max_new_tokens=longest)


def _longest(tokenizer, rows: Sequence[dict], most: int = 512) -> int:
    """A quarter more than the longest reference answer, in tokens."""
    longest = max(len(tokenizer.encode(reference(row), add_special_tokens=False)) for row in rows)
    return min(most, longest + longest // 4 + 4)


def held_out_loss(model, examples: Sequence[Example]) -> float | None:
    """Mean negative log likelihood (nats) of a token that counts; None when nothing counts."""
    count = sum(example.counted for example in examples)
    return -sum(answer_logps(model, examples)) / count if count else None


@torch.no_grad()
def answer_logps(model, examples: Sequence[Example]) -> list[float]:
    """The log-probability (nats) of what counts in each row, summed over its tokens; 0 where nothing counts."""
    training, out = model.training, [0.0] * len(examples)
    model.eval()
    order = sorted((i for i, e in enumerate(examples) if e.counted), key=lambda i: len(examples[i].ids))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    while order:
        size = max(1, min(16, LOGIT_BYTES // (len(examples[order[-1]].ids) * vocabulary * 4)))
        chosen, order = order[-size:], order[:-size]
        rows, width = [examples[i] for i in chosen], len(examples[chosen[-1]].ids)
        ids = torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in rows], device=model.device)
        mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in rows], device=model.device)
        labels = torch.tensor([e.labels + [-100] * (width - len(e.labels)) for e in rows], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        for i, loss in zip(chosen, losses.sum(1).tolist(), strict=True):
            out[i] = -loss
    model.train(training)
    return out
