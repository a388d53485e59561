"""The question bank: `bank/*.yml` read into dataclasses, and refused with file, id and field of every problem.

A file is a list of items. Every item has

    id        kebab-case, never changed once published        kind     card | number | bug | code | case
    level     basic | advanced | expert                       minutes  1 to 45
    topic     an id of topics.yml                             lesson   two digits in quotes; section: a heading of it
    question  text (markdown, LaTeX in $..$)                  tags     a list of words
    rows      the rows of the source notes that it covers, may be []
    sources   [{title, arxiv: "2106.09685"} or {title, url} or {title, library: "trl.SFTTrainer"}], at least one

and the fields of its kind: see the dataclasses below; a field with a default may be left out.
This module checks the form only, and imports no torch. Whether the things named exist (topics, functions, detectors)
is `links.problems`. `python -m finetune_lab.course.drills.schema` checks both and prints the counts.
"""

import importlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from finetune_lab.errors import UserError

BANK = Path(__file__).with_name("bank")
LEVELS = ("basic", "advanced", "expert")


@dataclass(frozen=True)
class Source:
    title: str
    arxiv: str | None = None
    url: str | None = None
    library: str | None = None


@dataclass(frozen=True)
class FollowUp:
    question: str
    answer: str


@dataclass(frozen=True)
class CommonMistake:
    """What people say, and why it is wrong."""

    says: str
    because: str


@dataclass(frozen=True)
class UnitMistake:
    """An answer that is `factor` times the right one: the hint says which unit was meant."""

    factor: float
    hint: str


@dataclass(frozen=True)
class WrongNumber:
    """A typical wrong number: the same function with `arguments` changed, another `compute` with its own
    `arguments`, a `factor`, or several of these."""

    hint: str
    compute: str | None = None
    arguments: dict | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class WrongFix:
    """A repair that does not repair: `line_text` in place of the wrong line."""

    line_text: str
    hint: str


@dataclass(frozen=True)
class Point:
    """One point of a rubric. `weight` 1 to 3; `why` an interviewer listens for it."""

    point: str
    weight: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """What every kind has. `file` is the name of the file it came from."""

    id: str
    kind: str
    level: str
    minutes: int
    topic: str
    lesson: str
    question: str
    tags: tuple[str, ...]
    rows: tuple[str, ...]
    sources: tuple[Source, ...]
    section: str | None = None
    file: str = ""


@dataclass(frozen=True, kw_only=True)
class Card(Item):
    answer: str
    follow_ups: tuple[FollowUp, ...]
    wrong: CommonMistake


@dataclass(frozen=True, kw_only=True)
class Number(Item):
    """`draw`: name -> a list of choices, or {low, high, step}. `question` and `solution` are str.format templates over
    the drawn names; `solution` also has `{answer}`, in `unit`. LaTeX braces are doubled.

    `compute` is "finetune_lab.methods.counts:lora_parameters"; `arguments` maps its parameters to drawn names or
    constants. A choice may be a mapping (`model: [{name: 8B, width: 4096}]`), used as `{model[name]}` in a template and
    as `model.width` in `arguments`. `scale` divides the result (1.0e+9 for GB). `tolerance` is relative, 0 is exact.
    """

    draw: dict
    compute: str
    arguments: dict
    unit: str
    tolerance: float
    solution: str
    scale: float = 1.0
    unit_mistakes: tuple[UnitMistake, ...] = ()
    wrong: tuple[WrongNumber, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bug(Item):
    """`line` (from 1) of `snippet` is wrong; `fix` replaces it (one line or several). `detector` is a function of
    drills/detectors.py: it takes the snippet's namespace and returns None when healthy, else a sentence."""

    snippet: str
    line: int
    fix: str
    explain: str
    detector: str
    wrong_fixes: tuple[WrongFix, ...]


@dataclass(frozen=True, kw_only=True)
class Code(Item):
    """`reference` is "finetune_lab.methods.lora:LoRALinear"; `exercise` a name in drills/code_tests.py.
    `limit_minutes` is the learner's time."""

    starter: str
    reference: str
    exercise: str
    limit_minutes: int


@dataclass(frozen=True, kw_only=True)
class Case(Item):
    answer: str
    rubric: tuple[Point, ...]


KINDS: dict[str, type[Item]] = {"card": Card, "number": Number, "bug": Bug, "code": Code, "case": Case}
# field -> (class of its entries, least number of them); None: one mapping, not a list
NESTED = {
    "sources": (Source, 1),
    "follow_ups": (FollowUp, 1),
    "unit_mistakes": (UnitMistake, 0),
    "wrong_fixes": (WrongFix, 2),
    "rubric": (Point, 5),
}


def load(bank: Path = BANK) -> list[Item]:
    """Every item of the bank, files in the order of their names.

    Raises:
        UserError: an item is not as this module says; names file, id and field of every problem found.
    """
    items, problems = [], []
    for path in sorted(bank.glob("*.yml")):
        found, wrong = _read(path)
        items += found
        problems += wrong
    problems += [
        f"{', '.join(sorted({item.file for item in items if item.id == id}))}: {id}: id: stands {n} times, expected once"
        for id, n in Counter(item.id for item in items).items()
        if n > 1
    ]
    if problems:
        raise UserError(f"the question bank has {len(problems)} to mend:\n  " + "\n  ".join(problems))
    return items


def _read(path: Path) -> tuple[list[Item], list[str]]:
    from finetune_lab.course.drills.rules import item_problems  # which needs the dataclasses above

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [], [f"{path.name}: not valid YAML: {' '.join(str(error).split())}"]
    if not isinstance(entries, list):
        return [], [f"{path.name}: expected a list of items, got {type(entries).__name__}"]
    items, problems = [], []
    for position, entry in enumerate(entries, 1):
        id = entry.get("id") if isinstance(entry, dict) else None
        wrong = list(item_problems(entry))
        problems += [f"{path.name}: {id or f'item {position}'}: {problem}" for problem in wrong]
        if not wrong:
            items.append(_build(KINDS[entry["kind"]], {**entry, "file": path.name}))
    return items, problems


def _build(cls: type, entry: dict):
    """A dataclass of checked YAML: lists become tuples, mappings of known shape become dataclasses."""
    values = {}
    for key, value in entry.items():
        inner = nested(cls, key)
        if inner and isinstance(value, list):
            value = tuple(_build(inner[0], one) for one in value)
        elif inner:
            value = _build(inner[0], value)
        elif isinstance(value, list):
            value = tuple(value)
        values[key] = value
    return cls(**values)


def nested(cls: type, key: str) -> tuple[type, int | None] | None:
    """The dataclass of a field's entries and how many it needs (None: it is one mapping); None for a plain field."""
    if key == "wrong":
        return {Card: (CommonMistake, None), Number: (WrongNumber, 0)}.get(cls)
    return NESTED.get(key)


def counts(items: Iterable[Item]) -> dict[str, dict[str, int]]:
    """How many items by kind, level and lesson, each in its natural order."""
    items = list(items)
    by = {key: Counter(getattr(item, key) for item in items) for key in ("kind", "level", "lesson")}
    order = {"kind": list(KINDS), "level": LEVELS, "lesson": sorted(by["lesson"])}
    return {key: {value: by[key][value] for value in order[key]} for key in by}


def main() -> int:
    """Check the bank; print what is wrong, or how many items there are."""
    from finetune_lab.course.drills import links

    try:
        items = load()
    except UserError as error:
        print(error)
        return 1
    wrong = links.problems(items)
    for line in wrong:
        print(line)
    print(f"{len(items)} items")
    for key, by in counts(items).items():
        print(f"  by {key}: " + ", ".join(f"{value} {n}" for value, n in by.items()))
    print(f"  source rows covered: {len({row for item in items for row in item.rows})}")
    return 1 if wrong else 0


if __name__ == "__main__":
    # not `main` of this copy: `links` compares with the classes of the module as everybody else imports it
    raise SystemExit(importlib.import_module("finetune_lab.course.drills.schema").main())
