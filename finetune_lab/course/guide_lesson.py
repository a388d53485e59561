"""What a lesson's own source says to somebody who teaches it: sections, stop points, questions, wrong answers.

Read from `solutions/NN_name.py` (headings, exercises, predictions), from the executed solution (what a prediction came
to), from `exercises/lNN.py` (wrong answers and the hints that learners get) and from the drills' cards.

Minutes: one for each section; the rest of the lesson's minutes is shared in proportion to the exercises' own minutes
(in their headings) and to what reading costs at 150 words, 30 lines of code a minute and 1.5 minutes a prediction.
Whole minutes, which add up to the lesson's.
"""

import functools
import re
from dataclasses import dataclass, field

import nbformat

from finetune_lab.course import build, check, lint
from finetune_lab.course.drills import schema
from finetune_lab.course.lessons import Lesson
from finetune_lab.errors import UserError

WORDS, LINES, PREDICTION = 150, 30, 1.5  # words a minute, lines of code a minute, minutes a prediction
_EXERCISE = re.compile(r"^### Exercise (\d+\.\d+) · (.+?) \((\d+) minutes?\)", re.MULTILINE)
_ASKS = re.compile(r"\?|\b[Pp]redict\b|\b[Gg]uess which\b")


@dataclass(frozen=True)
class Stop:
    """A point where the room works: an exercise or a prediction. `minutes` are those that the lesson itself names.

    `ask` is what the lesson asks, `answer` what the tiny model gave (predictions); `hints` are (wrong, hint) pairs.
    """

    id: str
    kind: str  # exercise | prediction
    title: str = ""
    minutes: float = PREDICTION
    ask: str = ""
    answer: str = ""
    hints: tuple[tuple[str, str], ...] = ()


@dataclass
class Section:
    """The cells under one second-level heading; the first is what stands before any."""

    title: str
    words: int = 0
    lines: int = 0
    stops: list[Stop] = field(default_factory=list)
    minutes: int = 0

    @property
    def estimate(self) -> float:
        """Minutes by the module's rule, before they are made to fit the lesson's."""
        return self.words / WORDS + self.lines / LINES + sum(stop.minutes for stop in self.stops)


@dataclass(frozen=True)
class Sheet:
    """A lesson as an instructor needs it. `minutes` is the header's, and the sum of the sections'."""

    lesson: Lesson
    title: str
    minutes: int
    needs: str
    promise: str
    sections: list[Section]
    cards: list[schema.Card]

    @property
    def exercise_minutes(self) -> int:
        stops = [stop for section in self.sections for stop in section.stops]
        return sum(stop.minutes for stop in stops if stop.kind == "exercise")


def pieces(markdown: str) -> list[tuple[str | None, str]]:
    """A text cut at its second-level headings (not in code): (heading or None, text with the heading's line)."""
    parts: list[tuple[str | None, list[str]]] = [(None, [])]
    fenced = False
    for line in markdown.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("## ") and not fenced:
            parts.append((line[3:].strip(), []))
        parts[-1][1].append(line)
    return [(title, "\n".join(lines)) for title, lines in parts if title or any(line.strip() for line in lines)]


def question(text: str) -> str:
    """The last question of a text with what leads to it: two sentences before it, in its paragraph, and one after."""
    text = re.sub(r"(?m)^#+ .*$", "", re.sub(r"(?s)```.*?```", "", text))
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    asking = [part for part in paragraphs if _ASKS.search(part)]
    if not asking:
        return ""
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z`*\"(0-9])", asking[-1])
    last = max(i for i, sentence in enumerate(sentences) if _ASKS.search(sentence))
    words = " ".join(sentences[max(0, last - 2) : last + 2])
    words = re.sub(r"\*\*Predict(, then run)?[:.]\*\* ", "", words).strip()
    return words[:1].upper() + words[1:]


def answers(lesson: Lesson) -> dict[str, str]:
    """prediction id -> what it came to in the executed solution; empty without outputs."""
    if not lesson.solution.exists():
        return {}
    found = {}
    for cell in nbformat.read(lesson.solution, as_version=4).cells:
        for output in cell.get("outputs", []):
            found |= re.findall(r"^(\d\d-p\d+): you said .+?, it is (.+?): ", output.get("text", ""), re.MULTILINE)
    return found


def _exercise(name: str, minutes: dict[str, int], where: str) -> Stop:
    exercise = check.load_all().get(name)
    if exercise is None:
        raise UserError(f"{where}: check.{name}(...) is no exercise; define it in finetune_lab/course/exercises.")
    number = exercise.id.removeprefix("0")
    if number not in minutes:
        raise UserError(
            f"{where}: exercise {number} needs its heading above, like '### Exercise {number} · Title (10 minutes)'."
        )
    wrong = [(repr(one.answer) if exercise.kind == "value" else "", one.hint) for one in exercise.wrong]
    return Stop(number, "exercise", exercise.title, minutes[number], hints=tuple(wrong))


def sections(lesson: Lesson) -> list[Section]:
    """The lesson's sections in order, each with its stop points; minutes not yet shared out."""
    found, minutes, said = [Section("Opening")], {}, ""
    came_to = answers(lesson)
    for cell in build.parse(lesson).cells:
        where = f"{lesson.source.name}, cell {cell.id}"
        if cell.cell_type == "markdown":
            said += "\n\n" + cell.source  # since the last prediction
            minutes |= {number: int(time) for number, _, time in _EXERCISE.findall(cell.source)}
            for title, text in pieces(cell.source):
                if title:
                    found.append(Section(title))
                found[-1].words += lint.words(text)
            continue
        found[-1].lines += lint.code_lines(cell.source)
        for name, id in re.findall(r"\bcheck\.(\w+)\(|\bpredict\.\w+\(\"([\w-]+)\"", cell.source):
            if name:
                found[-1].stops.append(_exercise(name, minutes, where))
            else:
                found[-1].stops.append(Stop(id, "prediction", ask=question(said), answer=came_to.get(id, "")))
                said = ""
    return found


def share(total: int, weights: list[float]) -> list[int]:
    """`total` in whole numbers in proportion to the weights, by largest remainders; they add up to `total`."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(value) for value in exact]
    behind = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in behind[: total - sum(whole)]:
        whole[i] += 1
    return whole


def time(found: list[Section], minutes: int, where: str) -> None:
    """Set the sections' minutes. See the module's docstring for the rule."""
    if minutes < len(found):
        raise UserError(f"{where}: {minutes} minutes for {len(found)} sections; mend `minutes:` in the header.")
    for section, rest in zip(found, share(minutes - len(found), [one.estimate for one in found]), strict=True):
        section.minutes = 1 + rest


@functools.cache
def _bank() -> list[schema.Item]:
    return schema.load()


def sheet(lesson: Lesson) -> Sheet:
    """Everything of one lesson.

    Raises:
        UserError: an an exercise without its heading and minutes, or a lesson with less than a minute a section.
    """
    notebook = build.parse(lesson)
    about, first = notebook.metadata["finetune_lab"], notebook.cells[0].source
    promise = re.search(r"\*\*(.+?)\*\*", first, re.DOTALL)
    found = sections(lesson)
    time(found, about["minutes"], lesson.source.name)
    order = {level: i for i, level in enumerate(schema.LEVELS)}
    cards = [item for item in _bank() if item.kind == "card" and item.lesson == lesson.number]
    cards.sort(key=lambda card: (order[card.level], card.id))
    words = " ".join(promise[1].split()) if promise else ""
    return Sheet(lesson, about["title"], about["minutes"], str(about["needs"]), words, found, cards)
