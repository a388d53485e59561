"""Failures of preference training that raise no error: the loss falls, and the model learns something else.

Each takes what can be known before training and returns a `Finding` or None, as in `silent`. Swapped columns cannot be
seen in the data: the preview shows which answer is called the better one, so look at it. Lesson 06 shows the failures.
"""

import json
from collections.abc import Sequence

from finetune_lab.lab.finetune.pairs import Pair, Rated
from finetune_lab.lab.finetune.silent import Finding, Lines, _some

ONE_SIDED = 0.8  # share of pairs whose chosen answer is the longer (or the shorter) one


def same_answer(pairs: Sequence[Pair], lines: Lines = None) -> Finding | None:
    """Two answers that differ in the file but not in what the model reads: the loss of such a pair stays log 2."""
    same = [i for i, pair in enumerate(pairs) if pair.counted and pair.chosen.ids == pair.rejected.ids]
    if not same:
        return None
    return Finding(
        "same answer twice", "error" if len(same) == len(pairs) else "warning",
        f"{len(same)} of {len(pairs)} pairs are the same tokens after the chat template and max_length ({_some(same, lines)}).",
        "Raise max_length if they part behind it, or drop them: they teach nothing.",
    )  # fmt: skip


def length_decides(pairs: Sequence[Pair], least: int = 10) -> Finding | None:
    """The better answer is nearly always the longer (or the shorter) one: length is easier to learn than quality."""
    pairs = [pair for pair in pairs if pair.counted]
    if len(pairs) < least:
        return None
    sizes = [(pair.chosen.counted, pair.rejected.counted) for pair in pairs]
    longer = sum(c > r for c, r in sizes) / len(pairs)
    shorter = sum(c < r for c, r in sizes) / len(pairs)
    if max(longer, shorter) < ONE_SIDED:
        return None
    word, share = ("longer", longer) if longer > shorter else ("shorter", shorter)
    means = [sum(column) / len(pairs) for column in zip(*sizes, strict=True)]
    return Finding(
        "length decides", "warning",
        f"the chosen answer is the {word} one in {share:.0%} of the pairs (mean {means[0]:.0f} against {means[1]:.0f} "
        "tokens): the model may learn length.",
        "Add pairs where it is the other way round, or use loss sigmoid_norm (DPO with log-probabilities a token).",
    )  # fmt: skip


def both_ways(rows: Sequence[dict], lines: Lines = None) -> Finding | None:
    """The same two answers to the same prompt, preferred once this way and once that way: they cancel."""
    first: dict[str, int] = {}
    against = []
    for i, row in enumerate(rows):
        first.setdefault(_key(row, "chosen", "rejected"), i)
        if _key(row, "rejected", "chosen") in first:
            against.append(i)
    if not against:
        return None
    return Finding(
        "preferred both ways", "warning",
        f"{len(against)} of {len(rows)} pairs say the opposite of an earlier pair ({_some(against, lines)}).",
        "Decide, or drop both. With many of them use loss robust and their share as label_smoothing.",
    )  # fmt: skip


def labelled_both_ways(rows: Sequence[dict], lines: Lines = None) -> Finding | None:
    """The same answer to the same prompt, called good once and bad once: the two rows pull against each other."""
    labels: dict[str, set[bool]] = {}
    for row in rows:
        labels.setdefault(_key(row, "completion"), set()).add(row["label"])
    against = [i for i, row in enumerate(rows) if len(labels[_key(row, "completion")]) == 2]
    if not against:
        return None
    return Finding(
        "labelled both ways", "warning",
        f"{len(against)} of {len(rows)} rows have an answer that is labelled true and false for the same prompt "
        f"({_some(against, lines)}).",
        "Decide, or drop them; balance the weights afterwards.",
    )  # fmt: skip


def prompt_in_answers(rows: Sequence[dict], lines: Lines = None) -> Finding | None:
    """Answers that begin with the prompt (older data sets hold whole conversations): the model learns to repeat it."""

    def repeats(row: dict) -> bool:
        asked = row["prompt"][-1]["content"].strip()
        said = [row[key][-1]["content"].strip() for key in ("chosen", "rejected", "completion") if key in row]
        return len(asked) > 8 and all(text.startswith(asked) for text in said)

    found = [i for i, row in enumerate(rows) if repeats(row)]
    if len(found) * 10 < len(rows):
        return None
    return Finding(
        "prompt in the answers", "warning",
        f"{len(found)} of {len(rows)} rows repeat the prompt at the start of every answer ({_some(found, lines)}).",
        "Cut it out of chosen and rejected: the prompt has its own column.",
    )  # fmt: skip


def one_kind_of_label(rated: Sequence[Rated], desirable_weight: float, undesirable_weight: float) -> Finding | None:
    """KTO needs good and bad answers, weighted to about the same: KTO paper (2402.01306) eq. 8 asks for
    1 <= (good weight * good rows) / (bad weight * bad rows) <= 4/3, or the same the other way round."""
    good = sum(row.good for row in rated)
    bad = len(rated) - good
    if not good or not bad:
        return Finding(
            "one kind of label", "error",
            f"all {len(rated)} labels are {'true' if good else 'false'}: there is nothing to tell apart.",
            "KTO needs good and bad answers.",
        )  # fmt: skip
    ratio = desirable_weight * good / (undesirable_weight * bad)
    if 0.75 <= ratio <= 4 / 3:
        return None
    name, value = ("undesirable_weight", good / bad) if good > bad else ("desirable_weight", bad / good)
    return Finding(
        "labels out of balance", "warning",
        f"{good} good and {bad} bad answers, with their weights {ratio:.2g} to 1: the larger kind drowns the other.",
        f"Give {name}: {value:.2g}, and 1 for the other.",
    )  # fmt: skip


def no_start(adapter: str | None, model: str) -> Finding | None:
    """Preference training tells answers apart; it does not teach a bare base model how to answer."""
    if adapter or model != "tiny":
        return None
    return Finding(
        "no start", "warning", "the tiny model is a bare base: it has never answered anybody.",
        "Run `finetune-lab sft` on good answers first, and give the folder of that run as adapter.",
    )  # fmt: skip


def _key(row: dict, *answers: str) -> str:
    return json.dumps([row["prompt"], *(row[name] for name in answers)], sort_keys=True)
