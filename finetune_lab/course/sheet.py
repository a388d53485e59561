"""`finetune-lab sheet`: the formula sheet and the glossary as one markdown page.

Made from `formulas.yml` and `topics.yml`, so it says what the lessons say. Examples are printed with the value that
the formula gives, computed here, not copied.
"""

import argparse
import importlib
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from finetune_lab.course import topics
from finetune_lab.errors import UserError

FORMULAS = Path(__file__).with_name("formulas.yml")
MARK = "<!-- made by `finetune-lab sheet`; changes here are lost -->"
_FUNCTIONS = {name: getattr(math, name) for name in ("sqrt", "log", "exp", "ceil", "sin", "cos", "acos", "pi")}
_FUNCTIONS |= {"min": min, "max": max}


@dataclass(frozen=True)
class Example:
    """Numbers to check a formula by; see the head of formulas.yml."""

    values: dict
    expression: str
    gives: float
    what: str | None = None
    compute: str | None = None
    arguments: dict | None = None

    def value(self) -> float:
        """The expression at the values."""
        return self._evaluate(self.expression)

    def computed(self) -> float:
        """What the package's function says for the same values."""
        module, name = self.compute.split(":")
        arguments = {key: self._evaluate(str(value)) for key, value in self.arguments.items()}
        return getattr(importlib.import_module(module), name)(**arguments)

    def _evaluate(self, expression: str):
        return eval(expression, {"__builtins__": {}}, {**_FUNCTIONS, **self.values})


@dataclass(frozen=True)
class Formula:
    """One line of the sheet. `lesson` comes from the topic and says `(planned)` while there is no such lesson."""

    id: str
    name: str
    formula: str
    symbols: dict[str, str]
    topic: str
    lesson: str
    source: tuple[str, str]
    trap: str | None = None
    example: Example | None = None
    untested: str | None = None


def load(path: Path = FORMULAS) -> list[Formula]:
    """Every formula, in the order of the file.

    Raises:
        UserError: a field is missing or unknown, an id stands twice or a topic does not exist; names all of them.
    """
    known = {topic.id: topic for topic in topics.load()}
    found, problems = [], []
    for position, entry in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")), 1):
        name = entry.get("id", f"formula {position}")
        needed = {"id", "name", "formula", "symbols", "topic", "source"}
        wrong = [f"{key}: missing" for key in sorted(needed - set(entry))]
        wrong += [f"{key}: no such field" for key in sorted(set(entry) - needed - {"trap", "example", "untested"})]
        wrong += [f"topic: {entry.get('topic')!r} is not in topics.yml"] * (entry.get("topic") not in known)
        wrong += ["id: stands twice"] * any(one.id == name for one in found)
        problems += [f"{name}: {one}" for one in wrong]
        if not wrong:
            topic = known[entry["topic"]]
            state = "" if topic.status == "written" else f" ({topic.status})"
            example = Example(**entry["example"]) if "example" in entry else None
            fields = {**entry, "example": example, "source": tuple(entry["source"])}
            found.append(Formula(**fields, lesson=f"{topic.lesson} {topic.title}{state}"))
    if problems:
        raise UserError(f"{path.name}: {len(problems)} to mend:\n  " + "\n  ".join(problems))
    return found


def number(value: float) -> str:
    """A number for people: 131072 is 131,072, 5.7e9 is 5.70 billion, 0.1579 stays."""
    if abs(value) >= 1e8:
        return f"{value / 1e9:,.3g} billion" if abs(value) < 1e15 else f"{value:.3g}"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"


def page() -> str:
    """The whole page: formulas by lesson, then the glossary, as markdown with LaTeX."""
    formulas = sorted(load(), key=lambda formula: formula.lesson[:2])
    lines = [MARK, "", "# Formula sheet", ""]
    lesson = None
    for formula in formulas:
        if formula.lesson[:2] != lesson:
            lesson = formula.lesson[:2]
            lines += [f"## {formula.lesson}", ""]
        lines += [f"**{formula.name}**", "", f"$${formula.formula}$$", ""]
        lines += [f"- ${symbol}$: {meaning}" for symbol, meaning in formula.symbols.items()]
        if formula.example:
            given = ", ".join(f"{key} = {number(value)}" for key, value in formula.example.values.items())
            what = f" ({formula.example.what})" if formula.example.what else ""
            lines.append(f"- Example: {given} gives {number(formula.example.value())}{what}.")
        if formula.trap:
            lines.append(f"- Take care: {formula.trap}")
        lines += [f"- Source: {_link(*formula.source)}", ""]
    lines += ["# Glossary", "", "| Term | 中文 | What it is | Lesson |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in topics.glossary()]
    return "\n".join(lines) + "\n"


def _link(title: str, where: str) -> str:
    return (
        f"[{title}]({where})"
        if where.startswith("http")
        else f"[{title}, arXiv {where}](https://arxiv.org/abs/{where})"
    )


def write(path: Path, text: str) -> None:
    """Write the page, whole or not at all, over an older page of this command but over nothing else.

    Raises:
        UserError: the file is somebody's own, or cannot be written.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a file name such as {path / 'sheet.md'}")
        if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
            raise UserError(f"{path} was not made by this command and is left alone; give another name")
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "sheet",
        help="the formula sheet and the glossary as one markdown page",
        description="Every formula with the meaning of its symbols, an example, the usual trap and its source; "
        "then the glossary in English and Chinese.",
        epilog="examples:\n  finetune-lab sheet --out sheet.md\n  finetune-lab sheet | less",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write to this file instead of the screen")
    parser.set_defaults(func=command)


def command(args: argparse.Namespace) -> int:
    """`finetune-lab sheet`."""
    text = page()
    if args.out is None:
        print(text, end="")
        return 0
    write(args.out, text)
    print(f"{args.out}: {len(load())} formulas, {len(topics.load())} terms")
    return 0
