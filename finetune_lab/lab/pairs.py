"""Preference data as token rows, and how likely a model finds them.

What: pairs (prompt, chosen, rejected) and thumbs (prompt, completion, label) in TRL's formats; ids and labels; summed
log-probabilities, two rows a pair or one row that shares the prompt; mismatched rows for KTO's reference point.
Leaves out: truncation, packing. Production: `trl.trainer.dpo_trainer.DataCollatorForPreference`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_lab.lab.train import Mask, collate, encode
from finetune_lab.methods import preference as p

Row = tuple[list, list]  # ids and labels of one text
Pair = tuple[Row, Row]  # chosen, rejected


def as_pairs(items: Sequence[dict]) -> list[dict]:
    """Items of the task `reply` as rows of prompt, chosen, rejected (TRL's preference format)."""
    return [{"prompt": i["prompt"], "chosen": i["completion"], "rejected": i["rejected"]} for i in items]


def as_thumbs(pairs: Sequence[dict]) -> list[dict]:
    """Each pair as two rows of prompt, completion, label: one thumb up, one down (TRL's unpaired format)."""
    return [
        {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
        for key in ("chosen", "rejected")
        for pair in pairs
    ]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict], mask: Mask = "completion") -> list[Pair]:
    """Ids and labels of both answers of each pair; `mask` as in `lab.train.encode`: "all" counts the prompt too."""
    sides = [
        encode(tokenizer, [{"prompt": pair["prompt"], "completion": pair[key]} for pair in pairs], mask)
        for key in ("chosen", "rejected")
    ]
    return list(zip(*sides, strict=True))


def row_logps(model: PreTrainedModel, rows: Sequence[Row], pad: int = 0) -> Tensor:
    """Summed log-probability of the labelled tokens of each row, (n,), with gradient; one forward pass."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    batch = {name: values.to(model.device) for name, values in collate(rows, pad).items()}
    hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    return p.hidden_logps(hidden, base.lm_head.weight, batch["labels"])


def pair_logps(model: PreTrainedModel, pairs: Sequence[Pair], pad: int = 0) -> Tensor:
    """Summed log-probabilities of a batch of pairs, (2, batch): chosen, rejected. The prompt is computed twice."""
    chosen, rejected = zip(*pairs, strict=True)
    return row_logps(model, [*chosen, *rejected], pad).view(2, -1)


def shared_pair_logps(model: PreTrainedModel, pairs: Sequence[Pair], pad: int = 0) -> Tensor:
    """`pair_logps` with one row a pair: all that stands before the first label is computed once.

    Needs an attention that takes any mask (sdpa, eager), and both answers behind the same prompt.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    starts = [start_of(chosen) for chosen, _ in pairs]
    answers = ([pair[side][0][start:] for start, pair in zip(starts, pairs, strict=True)] for side in (0, 1))
    heads = [pair[0][0][:start] for start, pair in zip(starts, pairs, strict=True)]
    rows = p.shared_rows(heads, *answers, pad).to(model.device)
    inputs = {"input_ids": rows.ids, "position_ids": rows.positions, "attention_mask": rows.allowed}
    hidden = base.model(**inputs, use_cache=False)[0]
    labels = [label for start, pair in zip(starts, pairs, strict=True) for _, row in pair for label in row[start:]]
    counted = torch.tensor(labels, device=model.device) != p.IGNORE_INDEX
    states = hidden.flatten(0, 1)[rows.places[counted]]
    logps = p.target_logps(states, base.lm_head.weight, rows.targets[counted])
    return p.sum_by(logps, rows.answers[counted], 2 * len(pairs)).view(2, -1)


@torch.no_grad()
def frozen_logps(model: PreTrainedModel, rows: Sequence, logps: Callable = pair_logps, batch_size: int = 16) -> Tensor:
    """`logps` of all rows or pairs in eval mode and without gradient, in batches: (2, n) of pairs, (n,) of rows."""
    training = model.training
    model.eval()
    parts = [logps(model, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    model.train(training)
    return torch.cat(parts, -1)


def answer_length(row: Row) -> int:
    """Labelled tokens of a row that something predicts."""
    return sum(label != p.IGNORE_INDEX for label in row[1][1:])


def start_of(row: Row) -> int:
    """The place of the first label, at least 1: a first token is predicted by nothing."""
    return max(1, next(t for t, label in enumerate(row[1]) if label != p.IGNORE_INDEX))


def with_mismatched(rows: list[Row]) -> list[Row]:
    """The rows, then each prompt with the answer of the row before it (the last one's for the first), as TRL pairs them."""
    starts = [start_of(row) for row in rows]
    heads = [ids[:start] for (ids, _), start in zip(rows, starts, strict=True)]
    tails = [ids[start:] for (ids, _), start in zip(rows, starts, strict=True)]
    tails = tails[-1:] + tails[:-1]
    return rows + [(head + tail, [p.IGNORE_INDEX] * len(head) + tail) for head, tail in zip(heads, tails, strict=True)]
