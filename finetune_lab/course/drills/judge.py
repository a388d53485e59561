"""The verdict on an answer, whatever the kind of the drill. Nothing raises, nothing is stored.

    judge.number(drawn, "16.8M")            drawn = numbers.draw(item, seed)
    judge.bug(item, 3, "loss = ...")        the line that the learner names, and what should stand there
    judge.code(item, source)                the learner's whole code, as text
    judge.case(item, {0, 2, 3})             the points of the rubric that the learner ticked
    judge.card(item, "good")                the learner's own judgement: again, hard, good or easy

Bugs and code run in a process of their own (`sandbox`), one process an answer.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from finetune_lab.course.drills import numbers, sandbox
from finetune_lab.course.drills.schema import Bug, Card, Case, Code

RATINGS = {"again": 0.0, "hard": 0.5, "good": 1.0, "easy": 1.0}
PASS = 0.6  # of the weight of a rubric


@dataclass(frozen=True)
class Verdict:
    """`status` is

        ok             right
        wrong          wrong; `text` says what or gives the hint for this mistake
        not attempted  the starter as it was, or nothing
        again          nothing to judge (not a number, a unit missing, code that does not end): do not count it

    `text` is for the learner. `score` is 0 to 1. `printed` is what the learner's code printed.
    """

    status: str
    text: str
    score: float = 0.0
    printed: str = ""


def number(drawn: numbers.Drawn, text: object) -> Verdict:
    """What was typed, against the answer of the drawn question."""
    status, sentence = numbers.verdict(drawn, text)
    return Verdict(status, sentence, float(status == "ok"))


def bug(item: Bug, line: object, text: object) -> Verdict:
    """The learner's repair: `text` (one line or several, empty to delete) in place of `line` (from 1) of the snippet.

    Any repair that satisfies the detector is right, wherever it stands.
    """
    lines = item.snippet.rstrip("\n").split("\n")
    try:
        line = int(str(line).strip())
    except ValueError:
        return Verdict("again", f"{line!r} is not a line: name one by its number, 1 to {len(lines)}")
    if not 1 <= line <= len(lines):
        return Verdict("again", f"there is no line {line}: the snippet has lines 1 to {len(lines)}")
    text = "" if text is None else str(text)
    if same_code(text, lines[line - 1]):
        return Verdict("not attempted", f"line {line} is as it was: write what should stand there")
    result = sandbox.run({"kind": "bug", "snippet": repaired(item, line, text), "detector": item.detector})
    if result.status != "wrong":
        return Verdict(result.status, result.text or item.explain, float(result.status == "ok"), result.printed)
    hint = next(
        (wrong.hint for wrong in item.wrong_fixes if line == item.line and same_code(text, wrong.line_text)), None
    )
    here = "" if line == item.line else f"line {line} is not the one. "
    return Verdict("wrong", here + (hint or f"still wrong: {result.text}"), 0.0, result.printed)


def repaired(item: Bug, line: int, text: str) -> str:
    """The snippet with `text` in place of `line`. Text without indentation gets that of the line it replaces."""
    lines = item.snippet.rstrip("\n").split("\n")
    old, new = lines[line - 1], text.rstrip().split("\n")
    if new[0] and not new[0][0].isspace():
        new = [old[: len(old) - len(old.lstrip())] + one if one.strip() else one for one in new]
    return "\n".join([*lines[: line - 1], *new, *lines[line:]]) + "\n"


def same_code(one: str, other: str) -> bool:
    """Do two lines say the same, whatever their spaces, quotes and comments?"""
    return _meaning(one) == _meaning(other)


def _meaning(line: str) -> str:
    text = "\n".join(line.strip().split("\n"))
    for block in ("", " pass"):  # `for x in y:` is whole with a body
        try:
            return ast.dump(ast.parse(text + block))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return " ".join(text.split())


def code(item: Code, source: object, seed: int | None = None) -> Verdict:
    """The learner's code against the hidden tests. A `seed` gives the same cases again; None draws new ones."""
    source = "" if source is None else str(source)
    if not source.strip() or same_code(source, item.starter):
        return Verdict("not attempted", "this is the starter: write your code")
    result = sandbox.run({"kind": "code", "exercise": item.exercise, "source": source, "seed": seed})
    return Verdict(result.status, result.text, float(result.status == "ok"), result.printed)


def case(item: Case, ticked: Iterable[int]) -> Verdict:
    """The share of the rubric's weight that the learner ticked (positions from 0)."""
    try:
        chosen = {int(one) for one in ticked}
    except (TypeError, ValueError):
        return Verdict("again", "tick points by their numbers")
    unknown = sorted(one for one in chosen if not 0 <= one < len(item.rubric))
    if unknown:
        return Verdict("again", f"the rubric has points 1 to {len(item.rubric)}; there is no {unknown[0] + 1}")
    got = sum(item.rubric[one].weight for one in chosen)
    total = sum(point.weight for point in item.rubric)
    missed = [point for at, point in enumerate(item.rubric) if at not in chosen]
    text = f"{got} of {total} points"
    if missed:
        worst = max(missed, key=lambda point: point.weight)
        text += f"; you missed: {worst.point} ({worst.why})"
    return Verdict("ok" if got / total >= PASS else "wrong", text, got / total)


def card(item: Card, rating: object) -> Verdict:
    """The learner's own judgement of a card."""
    word = str(rating).strip().lower()
    if word not in RATINGS:
        return Verdict("again", f"{rating!r} is not a rating: say {', '.join(RATINGS)}")
    return Verdict("wrong" if word == "again" else "ok", word, RATINGS[word])
