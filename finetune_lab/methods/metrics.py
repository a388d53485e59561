"""Exact match: the share of answers that equal their reference, and nothing softer.

What the course counts for every task with one right answer. Formula: mean over i of 1[strip(p_i) == strip(r_i)].
Leaves out: partial credit (field F1 in `lab.tasks`), numbers written differently, several right answers.
In production: the `exact_match` metric of lm-evaluation-harness, with its normalisation options.
"""

from collections.abc import Sequence


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share (0 to 1) of predictions equal to their reference, white space around both ignored; 0 for no items.

    Raises ValueError when the two have different lengths.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give one each")
    if not predictions:
        return 0.0
    right = sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))
    return right / len(predictions)
