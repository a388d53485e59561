"""Predict, then run: the learner commits to a number before the cell shows it.

    # BEGIN SOLUTION
    guess = 30            # becomes `guess = ...` in the learner's notebook
    # END SOLUTION
    predict.number("01-p1", guess, actual=100 * correct / total, unit="%")

Never raises for what the learner wrote. A guess is stored in the progress file; the first one counts.
"""

import numbers
import os

from finetune_lab.course import progress
from finetune_lab.errors import UserError


def number(id: str, guess, actual, unit: str = "") -> None:
    """Print the guess, the actual number and the difference in `unit`. `guess` is `...` or None until it is made."""
    actual = _plain(actual)
    guess = _plain(guess)
    if guess is ... or guess is None:
        print(f"[ ] {id}: no prediction yet: write a number first. It is {_show(actual, unit)}.")
        return
    if not isinstance(guess, int | float) or isinstance(guess, bool) or not abs(guess) < 1e300:  # nan, inf
        print(
            f"[ ] {id}: a prediction is a number, like guess = 30; yours is {guess!r}. Correct it and run the cell again."
        )
        return
    off = abs(guess - actual)
    off_unit = "points" if unit == "%" else unit
    verdict = "exactly right" if off == 0 else f"off by {_show(off, off_unit)}"
    print(f"{id}: you said {_show(guess, unit)}, it is {_show(actual, unit)}: {verdict}.")
    _store(id, guess, actual, unit)


def choice(id: str, guess, actual: str, options: list[str]) -> None:
    """Print whether the guess, one of `options`, is the actual outcome."""
    if actual not in options:
        raise UserError(f"{id}: the outcome {actual!r} is not one of the options {options}; the lesson must be fixed.")
    if guess is ... or guess is None:
        print(f"[ ] {id}: no prediction yet: write one of {', '.join(map(repr, options))} first. It is {actual!r}.")
    elif guess not in options:
        print(
            f"[ ] {id}: a prediction is one of {', '.join(map(repr, options))}; yours is {guess!r}. "
            "Correct it and run the cell again."
        )
    else:
        verdict = "right" if guess == actual else "not what you expected"
        print(f"{id}: you said {guess!r}, it is {actual!r}: {verdict}.")
        _store(id, guess, actual, "")


def _plain(x):
    """A 0-d tensor or numpy number as a Python number; everything else as it is."""
    if hasattr(x, "item") and getattr(x, "ndim", 0) == 0:
        x = x.item()
    return int(x) if isinstance(x, numbers.Integral) and not isinstance(x, bool) else x


def _show(x, unit: str) -> str:
    text = f"{x:,}" if isinstance(x, int) else f"{x:.4g}"
    return f"{text} {unit}".strip()


def _store(id: str, guess, actual, unit: str) -> None:
    if os.environ.get("FINETUNE_LAB_CHECK", "learn") != "learn":
        return
    try:
        progress.record_prediction(id, guess, actual, unit)
    except UserError as error:
        print(f"    (not stored: {error})")
