"""Failures of fine-tuning that raise no error: the loss falls, and the model is wrong. One function each.

Each takes what can be known before training and returns a `Finding` (symptom, why, fix) or None. `error` means that
training would be for nothing; `warning` that it may be; `note` that it is harmless here and dangerous elsewhere.
Lesson 05 shows each of them on the tiny model.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_lab.lab.finetune.encode import Example
from finetune_lab.lab.finetune.recipe import tier_of
from finetune_lab.lab.templates import has_marks
from finetune_lab.methods.chat import IGNORE_INDEX

Lines = Sequence[int] | None  # the line of each row in its file, to name it by; None where there is no file


@dataclass(frozen=True)
class Finding:
    """One thing that somebody should know before training: what was found, and what to do."""

    name: str
    level: str  # error, warning or note
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.level}: {self.found} {self.fix}"


def no_labelled_token(examples: Sequence[Example], lines: Lines = None) -> Finding | None:
    """Rows where nothing counts in the loss: they teach nothing, and a batch of them has the loss 0/0 or 0."""
    empty = [i for i, example in enumerate(examples) if not example.counted]
    if not empty:
        return None
    return Finding(
        "no labelled token", "error" if len(empty) == len(examples) else "warning",
        f"{len(empty)} of {len(examples)} rows have no token that counts in the loss ({_some(empty, lines)}); they are left out.",
        "Raise max_length if the prompt fills it, or check which turns the loss counts.",
    )  # fmt: skip


def end_of_turn_not_in_loss(examples: Sequence[Example], end: int) -> Finding | None:
    """The end-of-turn id never counts: the model learns what to say and never to stop."""
    whole = [e for e in examples if e.counted and not e.cut]
    if not whole or any(label == end for e in whole for label in e.labels):
        return None
    return Finding(
        "end of turn not in the loss", "warning",
        f"the end-of-turn token (id {end}) counts in no row: the model will not learn to stop.",
        "Put it inside {% generation %} in the chat template, or use loss 'completion'.",
    )  # fmt: skip


def answer_cut_off(examples: Sequence[Example], max_length: int, lines: Lines = None) -> Finding | None:
    """Rows cut inside the answer: the model learns to stop in the middle, or never sees an end of turn."""
    cut = [i for i, e in enumerate(examples) if e.lost and e.counted]
    if not cut:
        return None
    lost = sum(e.lost for e in examples if e.counted)
    return Finding(
        "answer cut off", "warning",
        f"{len(cut)} of {len(examples)} rows lose the end of their answer at {max_length} tokens ({_some(cut, lines)}; "
        f"{lost} labelled tokens in all).",
        "Raise max_length, or shorten the prompts.",
    )  # fmt: skip


def pad_is_eos(tokenizer, end: int) -> Finding | None:
    """pad = end of turn: code that masks labels by `== pad_token_id` also masks every end of turn."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id not in (end, tokenizer.eos_token_id):
        return None
    return Finding(
        "pad = eos", "note",
        f"the padding token {tokenizer.pad_token!r} is also the token that ends a text.",
        "Harmless here: labels are masked by position. Code that masks by token id would never train the model to stop.",
    )  # fmt: skip


def no_generation_marks(tokenizer, loss: str) -> Finding | None:
    """The template cannot say which tokens the assistant wrote, so 'assistant' loss needs another template."""
    if loss != "assistant" or has_marks(tokenizer.chat_template):
        return None
    return Finding(
        "template without generation marks", "note",
        "the model's chat template does not mark the assistant's turns.",
        "The labels are made with a copy of the template that has the marks and renders the same text.",
    )  # fmt: skip


def double_bos(examples: Sequence[Example], bos: int | None, lines: Lines = None) -> Finding | None:
    """Two begin-of-text tokens: the template writes one and the tokenizer, or the data, adds another."""
    double = [i for i, e in enumerate(examples) if bos is not None and e.ids[:2] == [bos, bos]]
    if not double:
        return None
    return Finding(
        "double BOS", "warning",
        f"{len(double)} of {len(examples)} rows begin with two begin-of-text tokens ({_some(double, lines)}).",
        "The template writes it already: take it out of the data, or tokenise with add_special_tokens=False.",
    )  # fmt: skip


def rate_out_of_range(method: str, lr: float, parameters: int, kind: str = "extract") -> Finding | None:
    """A learning rate made for another method: full fine-tuning breaks at LoRA's rate, LoRA hardly moves at full's.

    The usual rate comes from `lab.tiers`; a tenth of it, or less, is called low, and more than five times it high.
    kind: the row of `lab.tiers`; preference training has its own ("dpo", "dpo-start"), with lower rates.
    """
    usual_of = tier_of(parameters).recipes[kind]
    usual = usual_of.full_lr if method == "full" else usual_of.lora_lr
    if usual / 10 < lr <= 5 * usual:
        return None
    low = lr < usual
    size = f"{parameters / 1e9:.3g} billion" if parameters >= 1e9 else f"{parameters / 1e6:.3g} million"
    return Finding(
        "learning rate out of range", "warning",
        f"the learning rate {lr:g} is {'low' if low else 'high'} for {method} on {size} parameters.",
        f"{'The model will hardly change' if low else 'The model may break'}: begin with {usual:g}.",
    )  # fmt: skip


def warmup_too_long(warmup: float, steps: int) -> Finding | None:
    """A warm-up of a fixed number of steps that fills a short run: the full rate is hardly reached."""
    share = warmup if warmup < 1 else warmup / max(steps, 1)
    if share <= 0.5:
        return None
    return Finding(
        "warm-up too long", "warning",
        f"the warm-up takes {min(share, 1):.0%} of the {steps} steps, so the full learning rate comes late or never.",
        "Give a share, such as warmup: 0.1.",
    )  # fmt: skip


def same_in_both(train: Sequence[str], valid: Sequence[str]) -> Finding | None:
    """Prompts (as text) that stand in training and validation: the score then measures memory."""
    both = len(set(train) & set(valid))
    if not both:
        return None
    return Finding(
        "validation seen in training", "warning",
        f"{both} of {len(set(valid))} scored prompts also stand in the training data: the score will be too good.",
        "Take them out of one of the two.",
    )  # fmt: skip


def repeated(rows: Sequence[str], lines: Lines = None) -> Finding | None:
    """The same row (as text) again and again: it counts as often as it stands there, and is learnt by heart first."""
    more = len(rows) - len(set(rows))
    if not more:
        return None
    most, times = Counter(rows).most_common(1)[0]
    first = rows.index(most)
    where = f"line {lines[first]}" if lines else f"row {first + 1}"
    return Finding(
        "repeated rows", "warning",
        f"{more} of {len(rows)} rows are copies of another one ({where} stands there {times} times).",
        "Keep one of each, unless the weight is meant.",
    )  # fmt: skip


def few_scored(rows: int, least: int = 50) -> Finding | None:
    """A score of a few rows moves by luck: the interval is 1.96 sqrt(p (1 - p) / n), widest at p = 1/2."""
    if not 0 < rows < least:
        return None
    half = 98 / math.sqrt(rows)
    return Finding(
        "few scored rows", "note",
        f"only {rows} rows are scored: a share of 50 % then means {max(0, 50 - half):.0f} to {min(100, 50 + half):.0f} %.",
        "Hold out more, or raise test_items, before you compare two runs.",
    )  # fmt: skip


def nothing_held_out(valid_rows: int) -> Finding | None:
    """No held-out rows: the report cannot tell learning from learning by heart."""
    if valid_rows:
        return None
    return Finding(
        "nothing held out", "note", "there is no validation data, so nothing is scored.",
        "Add hold_out: 0.1, or valid: FILE.",
    )  # fmt: skip


def fsdp_without_gpu(cuda: bool, environment=os.environ) -> Finding | None:
    """accelerate 1.15 turns an FSDP configuration on a CPU into DDP without a word: every process holds everything."""
    if cuda or environment.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    return Finding(
        "FSDP without a GPU", "warning",
        "FSDP was asked for, but there is no GPU: accelerate runs plain DDP, and each process holds the whole model.",
        "Use `torchrun --nproc-per-node N` without an FSDP configuration, or a machine with GPUs.",
    )  # fmt: skip


def _some(places: Sequence[int], lines: Sequence[int] | None, most: int = 5) -> str:
    """Where it was found. places: from 0; lines: of each place in the file, None where there is no file."""
    numbers = sorted({lines[i] if lines else i + 1 for i in places})
    some = ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
    return ("lines " if lines else "rows ") + some


def labelled_share(examples: Sequence[Example]) -> float:
    """Share of all tokens that count in the loss."""
    counted = sum(label != IGNORE_INDEX for e in examples for label in e.labels)
    return counted / max(1, sum(len(e.ids) for e in examples))
