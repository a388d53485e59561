"""Exercises of lesson 00, start here: one small function, to meet the machine that checks answers."""

from finetune_lab.course.checks import Draw, Wrong, case, exercise
from finetune_lab.methods import metrics

_WORDS = ("19", "oak", "refund", '{"order": "0412"}', "fish pie", "red")


def _cases(draw: Draw):
    for size in (1, 4, 7, 9):
        references = [draw.choice(_WORDS) for _ in range(size)]
        predictions = [r if draw.random() < 0.5 else draw.choice(_WORDS) for r in references]
        yield case(predictions, references)
    yield case(["oak ", "\nred", "19", "9", " pie\n"], ["oak", "red", "19", "19", " pie"])  # white space around both
    yield case(["It is 19.", "refund", "oak"], ["19", "refund", "oak"])  # a right answer inside a longer one
    yield case(["oak", "RED", "red"], ["oak", "red", "oak"])  # case counts, order counts
    yield case([], [])


def _count(predictions, references):
    return sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))


def _with_spaces(predictions, references):
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / max(len(predictions), 1)


def _prediction_stripped(predictions, references):
    return sum(p.strip() == r for p, r in zip(predictions, references, strict=True)) / max(len(predictions), 1)


def _contains(predictions, references):
    return sum(r.strip() in p for p, r in zip(predictions, references, strict=True)) / max(len(predictions), 1)


def _any_place(predictions, references):
    return sum(p.strip() in references for p in predictions) / max(len(predictions), 1)


def _percent(predictions, references):
    return 100 * metrics.exact_match(predictions, references)


def _empty_crashes(predictions, references):
    return sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)) / len(predictions)


exercise(
    "00.1",
    "exact match",
    metrics.exact_match,
    _cases,
    wrong=[
        Wrong(_count, "this counts the right answers: divide by the number of predictions to get a share"),
        Wrong(_with_spaces, "white space around both is ignored: strip both before you compare"),
        Wrong(_prediction_stripped, "white space around both is ignored: strip the reference as well"),
        Wrong(_contains, "'It is 19.' contains 19 but is not 19: compare with ==, not with `in`"),
        Wrong(_any_place, "compare each prediction with its own reference, not with all of them: zip the two lists"),
        Wrong(_percent, "a share lies between 0 and 1: do not multiply by 100"),
        Wrong(_empty_crashes, "no predictions at all: return 0.0 instead of dividing by zero"),
    ],
)
