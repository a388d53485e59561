"""From preference rows to token ids, exactly as `trl.DPOTrainer` and `trl.KTOTrainer` prepare them.

    pair      prompt, chosen, rejected: two sequences with the same beginning; the answers begin where either of them
              first parts from the rendered prompt
    rated     prompt, completion, label: one sequence and a thumb up or down

TRL tokenises these rows itself, so this is a second preparation of the same text: it is what the preflight shows, what
is scored, and a test holds it equal to TRL's, token by token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_lab.lab.finetune.encode import Example, preview, render, shortened
from finetune_lab.methods.chat import IGNORE_INDEX, completion_labels


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. Seen as one row (`ids`, `labels`, `counted`), it is the two sequences together."""

    chosen: Example
    rejected: Example

    @property
    def ids(self) -> list[int]:
        return self.chosen.ids + self.rejected.ids

    @property
    def labels(self) -> list[int]:
        return self.chosen.labels + self.rejected.labels

    @property
    def cut(self) -> int:
        return self.chosen.cut + self.rejected.cut

    @property
    def lost(self) -> int:
        return self.chosen.lost + self.rejected.lost

    @property
    def counted(self) -> int:
        """Tokens that count; 0 when one of the answers has none, as such a pair compares nothing."""
        return min(self.chosen.counted, self.rejected.counted) and self.chosen.counted + self.rejected.counted

    @property
    def longest(self) -> int:
        return max(self.chosen.longest, self.rejected.longest)


@dataclass(frozen=True)
class Rated(Example):
    """One answer and whether it was good."""

    good: bool = True


def encode_pair(row: dict, tokenizer, max_length: int) -> Pair:
    """Both answers of a row behind the same prompt. Raises UserError when the chat template refuses the row."""
    prompt = render(tokenizer, row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = [render(tokenizer, row["prompt"] + row[key])["input_ids"] for key in ("chosen", "rejected")]
    start = min(completion_labels(prompt, ids).count(IGNORE_INDEX) for ids in whole)
    return Pair(*(shortened(Example(ids, [IGNORE_INDEX] * start + ids[start:]), max_length) for ids in whole))


def encode_rated(row: dict, tokenizer, max_length: int) -> Rated:
    """The answer of a row and its label. Raises UserError when the chat template refuses the row."""
    prompt = render(tokenizer, row["prompt"], add_generation_prompt=True)["input_ids"]
    ids = render(tokenizer, row["prompt"] + row["completion"])["input_ids"]
    cut = shortened(Example(ids, completion_labels(prompt, ids)), max_length)
    return Rated(cut.ids, cut.labels, cut.cut, cut.lost, row["label"])


def encode_preferences(rows: Sequence[dict], tokenizer, max_length: int) -> list[Pair] | list[Rated]:
    """Every row, cut to max_length tokens (the end is lost, as in TRL's keep_start); nothing is dropped here."""
    return [(encode_rated if "label" in row else encode_pair)(row, tokenizer, max_length) for row in rows]


def as_rated(rows: Sequence[dict], seed: int) -> list[dict]:
    """Each pair as a good and a bad answer, in an order drawn from `seed`; rated rows are only shuffled.

    KTO estimates its reference point from answers shifted by one within a batch, so TRL reads the rows in order and
    never shuffles: two answers to one prompt must not stand side by side, nor all good answers before all bad ones.
    """
    rated = []
    for row in rows:
        if "label" in row:
            rated.append({key: row[key] for key in ("prompt", "completion", "label")})
        else:
            rated += [
                {"prompt": row["prompt"], "completion": row[k], "label": k == "chosen"} for k in ("chosen", "rejected")
            ]
    random.Random(seed).shuffle(rated)
    return rated


def lines_of_rated(rows: Sequence[dict], lines: Sequence[int], seed: int) -> list[int]:
    """The line of each row that `as_rated` gives; a pair stands there twice."""
    out = [line for row, line in zip(rows, lines, strict=True) for _ in range(1 if "label" in row else 2)]
    random.Random(seed).shuffle(out)
    return out


def preview_preference(example: Pair | Rated, tokenizer) -> str:
    """The text of a row, what is compared between [[ and ]], and which answer is the better one."""
    if isinstance(example, Rated):
        return f"{preview(example, tokenizer)}\n  label: {'good' if example.good else 'bad'}"
    start = next((i for i, label in enumerate(example.chosen.labels) if label != IGNORE_INDEX), None)
    chosen, rejected = (f"[[{tokenizer.decode(side.ids[start:])}]]" for side in (example.chosen, example.rejected))
    return f"{tokenizer.decode(example.chosen.ids[:start])}\n  chosen:   {chosen}\n  rejected: {rejected}"
