"""`finetune-lab guide`: the instructor's guide, one markdown page made from the lessons themselves.

Agendas (guide_agenda.py) and, for each lesson, a run sheet (guide_lesson.py reads it): clock, sections, stop points,
what to ask and what it came to, the usual wrong answers with the hint that the learner sees, questions for the room.
The committed copy is docs/instructor.md; a test and `--check` compare it with what the lessons say now.
"""

import argparse
import re
from pathlib import Path

from finetune_lab.course.guide_agenda import EXERCISES, STRETCH, WORKSHOPS, workshop
from finetune_lab.course.guide_lesson import Sheet, Stop, home, sheet
from finetune_lab.course.lessons import course_root, lessons, write_atomic
from finetune_lab.errors import UserError

MARK = "<!-- made by `finetune-lab guide` from the lessons; changes here are lost -->"
NAME = Path("docs") / "instructor.md"
HINTS, CARDS = 5, 4  # wrong answers an exercise, questions a lesson
EXPORT = "finetune-lab drill export --markdown drills.md --answers"

HOW = """A lesson is a notebook that checks itself, so the room works alone most of the time and you are free to walk
around. What only you can do: make everybody write a prediction *before* the cell runs, collect three of them aloud, and
let the room explain the difference. Nobody has to finish: a skipped exercise goes on with the reference.

The minutes of a section are those of its exercises, reading at 150 words and 30 lines of code a minute, and three minutes
a prediction (write, collect, explain), rounded up; where a lesson's first cell names more, the rest is shared out. Nobody
has tried them on a class. By this count most lessons take longer than their first cell says; the run sheet then says by
how much, and which exercises to leave for home. Agendas use the longer time."""

ROOM = """- A week before: `finetune-lab pack DIR` on a machine with internet; it makes a folder that installs without any
  (`finetune-lab pack --help`). A pack is for one system and one Python: ask first what the room has. Copy it to a USB
  stick for every five people, and try it on one machine of the room.
- The day before: on your own machine `finetune-lab doctor`, then `finetune-lab run --tree solutions`: every lesson runs
  to the end, and you see how long it computes.
- Learners need Python 3.11 or newer, 3 GB of disk and 2 GB of free memory. No GPU and no account. The default model is
  part of the package: nothing is downloaded during a lesson.
- A machine that was used before: `finetune-lab reset --all --progress` makes every notebook fresh and starts the
  progress again; what was there is kept beside it.
- On arrival: everybody runs `finetune-lab doctor --class NAME` and gives you the file: versions, machine, problems,
  progress; no code, no answers. NAME is their own choice, without spaces, and one that nobody else has, e.g. `anna-7`.
  `finetune-lab class FOLDER` reads a folder of such files and names the machines with problems.
- Screen: slides of a lesson's own cells with `finetune-lab slides NN --out DIR`; they work without internet.
- Power sockets, a clock that everybody sees, and paper: predictions are bolder when they are written down.
- During an exercise: `[x]` with a hint is the normal case. Wait for the second try before you help.
- At lunch and at the end, not in every break: collect the files again. `finetune-lab class FOLDER` shows who is where, and
  which exercise was wrong most.
- For the way home: `finetune-lab drill`."""


def cell(text: str) -> str:
    """A text as one cell of a markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _stops(stops: list[Stop]) -> str:
    return ", ".join(f"**{one.id}** ({one.minutes} min)" if one.kind == "exercise" else one.id for one in stops)


def _asked(stop: Stop) -> str:
    above = f" On the screen: `{stop.above}`." if stop.above else ""
    among = f" Choices: {', '.join(f'“{one}”' for one in stop.choices)}." if stop.choices else ""
    return f"- {stop.id}: {stop.ask}{above}{among} *It was {stop.answer or 'not recorded'}.*"


def run_sheet(one: Sheet) -> str:
    """One lesson's run sheet as markdown."""
    found = [(section, stop) for section in one.sections for stop in section.stops]
    predictions = [stop for _, stop in found if stop.kind == "prediction"]
    exercises = [stop for _, stop in found if stop.kind == "exercise"]
    number, over, late = one.lesson.number, one.minutes - one.header, home(one)
    lines = [f"### {number} · {one.title}", "", one.promise, ""]
    lines += [
        (
            f"{one.minutes} minutes, {one.exercise_minutes} of them exercises. Needs: {one.needs}. "
            f"[Complete lesson](../solutions/{one.lesson.name}.ipynb) · slides: `finetune-lab slides {number}`"
        ),
        "",
    ]
    if over > 0:
        leave = ", ".join(f"{stop.id} {stop.title} ({stop.minutes} min)" for stop in late)
        lines.append(
            f"That is {over} minutes more than the {one.header} of the lesson's first cell. "
            + (
                f"To keep to those, leave for home: {leave}."
                if late
                else "To keep to those, let everybody go on alone, without collecting predictions."
            )
        )
        lines.append("")
    lines += [
        "| At | Minutes | Section | Stop: predict (plain) or **exercise** |",
        "|---|---|---|---|",
    ]
    at = 0
    for section in one.sections:
        title = cell(section.title)
        lines.append(f"| {at // 60}:{at % 60:02d} | {section.minutes} | {title} | {_stops(section.stops)} |")
        at += section.minutes
    quiet = [section for section in one.sections[1:-1] if not section.stops and section.minutes > 1]
    if quiet:
        names = "; ".join(section.title for section in quiet)
        lines += ["", f"Late? These have no stop point ({sum(s.minutes for s in quiet)} minutes): {names}."]
    if predictions:
        lines += ["", "**Ask before the cell runs** (and what came out on the tiny model)", ""]
        lines += [_asked(stop) for stop in predictions]
    if exercises:
        lines += ["", "**Exercises: what goes wrong, and the hint that the learner sees**", ""]
    for stop in exercises:
        lines.append(f"- **{stop.id} {stop.title}** ({stop.minutes} minutes)")
        lines += [f"  - {wrong and f'{wrong}: '}“{' '.join(hint.split())}”" for wrong, hint in stop.hints[:HINTS]]
        if len(stop.hints) > HINTS:
            lines.append(f"  - and {len(stop.hints) - HINTS} more that have hints of their own")
    if one.cards:
        lines += [
            "",
            f"**Questions for the room** (answers and {_more(one)}: `{EXPORT} --lesson {number}`)",
            "",
        ]
    for card in one.cards[:CARDS]:
        lines.append(f"- {' '.join(card.question.split())}")
        says, because = (" ".join(text.split()) for text in (card.wrong.says, card.wrong.because))
        lines.append(f"  - Often said: *{says}* But: {because}")
    return "\n".join(lines) + "\n"


def _more(one: Sheet) -> str:
    rest = len(one.cards) - CARDS
    return f"{rest} more cards" if rest > 1 else "one more card" if rest == 1 else "follow-ups"


def page(root: Path) -> str:
    """The whole guide of the course folder `root` as markdown, the same text every time."""
    sheets = {one.number: sheet(one) for one in lessons(root)}
    total = sum(one.minutes for one in sheets.values())
    lines = [MARK, "", "# Instructor's guide", "", HOW, ""]
    alone = sum(one.header for one in sheets.values())
    lines += [
        f"{len(sheets)} lessons, {total} minutes ({total / 60:.1f} hours) with a class; the first cells add up to {alone}.",
        "",
    ]
    lines += ["| Lesson | With a class | First cell | Exercises | Predictions | Needs |", "|---|---|---|---|---|---|"]
    for number, one in sheets.items():
        stops = [stop.kind for section in one.sections for stop in section.stops]
        anchor = re.sub(r"[^\w -]", "", f"{number} · {one.title}".lower()).replace(" ", "-")
        row = [f"[{number} {one.title}](#{anchor})", one.minutes, one.header]
        row += [stops.count("exercise"), stops.count("prediction")]
        lines.append("| " + " | ".join(map(str, [*row, one.needs])) + " |")
    lines += ["", "## Checklist for the room", "", ROOM, "", "## Agendas", ""]
    lines += [
        f"Computed from the minutes below; a break comes after at most {STRETCH} minutes and {EXERCISES} exercises.",
        "",
    ]
    lines += [workshop(title, sheets) for title in WORKSHOPS]
    lines += ["## Run sheets", ""]
    return "\n".join(lines) + "\n" + "\n".join(run_sheet(one) for one in sheets.values())


def target(out: str | None, root: Path) -> Path:
    """The file to write: `out`, or instructor.md in it when it is a folder, or the course's own docs/instructor.md."""
    if out is None:
        return root / NAME
    path = Path(out)
    return path / NAME.name if path.is_dir() or not path.suffix else path


def _command(args: argparse.Namespace) -> int:
    root = course_root(args.root)
    path, text = target(args.out, root), page(root)
    old = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if args.check:
        print(f"{path.name} is {'up to date' if old == text else 'stale: finetune-lab guide'}")
        return 0 if old == text else 1
    if old is not None and not old.startswith(MARK):
        raise UserError(f"{path} was not made by this command and is left alone; give another name with --out.")
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from None
    print(f"{path}: {len(lessons(root))} lessons, {len(text.split())} words")
    return 0


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "guide",
        help="the instructor's guide, made from the lessons",
        description="Run sheets, agendas and questions for whoever teaches the course, as one markdown page made from "
        "the lessons' own headings, exercises, hints and cards.",
        epilog="example: finetune-lab guide --out guide.md",
    )
    parser.add_argument(
        "--out", metavar="FILE|DIR", help="where to write it (default: docs/instructor.md of the course)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is stale")
    parser.add_argument("--root", help="the course folder (default: found from here)")
    parser.set_defaults(func=_command)
