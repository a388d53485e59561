"""What a lesson's own source says to somebody who teaches it: sections, stop points, questions, wrong answers.

Read from `solutions/NN_name.py` (headings, exercises, predictions), from the executed solution (what a prediction came
to), from `exercises/lNN.py` (wrong answers and the hints that learners get) and from the drills' cards.

Minutes of a section: its exercises' own (in their headings), reading at 150 words and 30 lines of code a minute, and 3
minutes a prediction (write, collect three aloud, explain), rounded up. A lesson whose header names more shares the rest
out over its sections; one whose header names less takes longer, and `home` says which exercises to leave out.
"""

import functools
import math
import re
from dataclasses import dataclass, field

from finetune_lab.course import build, check, lint
from finetune_lab.course.drills import schema
from finetune_lab.course.guide_predictions import answers, choices, context, printed, question, shown
from finetune_lab.course.lessons import Lesson
from finetune_lab.errors import UserError

WORDS, LINES, PREDICTION = 150, 30, 3  # words a minute, lines of code a minute, minutes a prediction
_EXERCISE = re.compile(r"^### Exercise (\d+\.\d+) · (.+?) \((\d+) minutes?\)", re.MULTILINE)


@dataclass(frozen=True)
class Stop:
    """A point where the room works: an exercise or a prediction. `minutes` are those that the lesson itself names.

    `ask` is what the lesson asks, `choices` what it may be, `above` the last lines that the cell above printed when the
    question needs it, `answer` what the tiny model gave (predictions); `hints` are (wrong, hint) pairs.
    """

    id: str
    kind: str  # exercise | prediction
    title: str = ""
    minutes: float = PREDICTION
    ask: str = ""
    choices: tuple[str, ...] = ()
    above: str = ""
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
        """Minutes by the module's rule, not yet rounded."""
        return self.words / WORDS + self.lines / LINES + sum(stop.minutes for stop in self.stops)


@dataclass(frozen=True)
class Sheet:
    """A lesson as an instructor needs it. `header` are the minutes that its first cell names."""

    lesson: Lesson
    title: str
    header: int
    needs: str
    promise: str
    sections: list[Section]
    cards: list[schema.Card]

    @property
    def minutes(self) -> int:
        return sum(section.minutes for section in self.sections)

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
    """The lesson's sections in order, each with its stop points; minutes not yet set."""
    found, minutes, said, above = [Section("Opening")], {}, "", ""
    texts = printed(lesson)
    came_to = answers(texts)
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
                ask = question(said)
                seen = context(ask, above, texts.get(cell.id, ""))
                options = choices(cell.source, id, where)
                stop = Stop(id, "prediction", ask=ask, choices=options, above=seen, answer=came_to.get(id, ""))
                found[-1].stops.append(stop)
                said = ""
        above = shown(texts[cell.id]) if texts.get(cell.id, "").strip() else above
    return found


def share(total: int, weights: list[float]) -> list[int]:
    """`total` in whole numbers in proportion to the weights, by largest remainders; they add up to `total`."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(value) for value in exact]
    behind = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in behind[: total - sum(whole)]:
        whole[i] += 1
    return whole


def time(found: list[Section], minutes: int) -> None:
    """Set the sections' minutes, `minutes` in all if that is enough. See the module's docstring for the rule."""
    needed = [max(1, math.ceil(section.estimate - 1e-9)) for section in found]
    more = share(max(0, minutes - sum(needed)), [section.estimate or 1 for section in found])
    for section, least, rest in zip(found, needed, more, strict=True):
        section.minutes = least + rest


def home(one: Sheet) -> list[Stop]:
    """The exercises to leave out to keep to the header: the last ones, on which the least is built; one always stays."""
    stops = [stop for section in one.sections for stop in section.stops if stop.kind == "exercise"]
    out, over = [], one.minutes - one.header
    while over > 0 and len(stops) > 1:
        out.append(stops.pop())
        over -= int(out[-1].minutes)
    return out


@functools.cache
def _bank() -> list[schema.Item]:
    return schema.load()


def sheet(lesson: Lesson) -> Sheet:
    """Everything of one lesson.

    Raises:
        UserError: an exercise without its heading and minutes, or options of a prediction that cannot be read.
    """
    notebook = build.parse(lesson)
    about, first = notebook.metadata["finetune_lab"], notebook.cells[0].source
    promise = re.search(r"\*\*(.+?)\*\*", first, re.DOTALL)
    found = sections(lesson)
    time(found, about["minutes"])
    order = {level: i for i, level in enumerate(schema.LEVELS)}
    cards = [item for item in _bank() if item.kind == "card" and item.lesson == lesson.number]
    cards.sort(key=lambda card: (order[card.level], card.id))
    words = " ".join(promise[1].split()) if promise else ""
    return Sheet(lesson, about["title"], about["minutes"], str(about["needs"]), words, found, cards)
