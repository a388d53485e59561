"""`finetune-lab class FOLDER`: a class at a glance, from the files that learners hand in (classroom.py says what is in one).

Who is where, which exercises go wrong, which machines have problems. classroom_read.py reads the files.
"""

import argparse
import json
import unicodedata
from collections import defaultdict
from datetime import datetime
from pathlib import Path

from finetune_lab.course.classroom_read import collect
from finetune_lab.errors import UserError


def overview(learners: list[dict], left_out: list[str]) -> dict:
    """The figures of a class: progress by learner and lesson, exercises by wrong tries, machines with problems."""
    from finetune_lab.course import check

    titles = {exercise.id: exercise.title for exercise in check.load_all().values()}
    lessons = defaultdict(set)
    for id in titles:
        lessons[id[:2]].add(id)
    left_out = list(left_out)
    for learner in learners:
        strange = sorted(learner["exercises"].keys() - titles.keys())
        if strange:
            left_out.append(f"{learner['name']}: exercises that this course does not have: {', '.join(strange[:5])}")
    rows, wrong = [], []
    for learner in learners:
        done = {
            number: sum(learner["exercises"].get(id, {}).get("ok", False) for id in ids)
            for number, ids in sorted(lessons.items())
        }
        row = {"name": learner["name"], "when": learner["when"], "ready": learner["ready"], "right": done}
        rows.append(row | {"problems": learner["problems"]})
    for id in sorted({id for ids in lessons.values() for id in ids}):
        tried = [learner["exercises"][id] for learner in learners if learner["exercises"].get(id, {}).get("tries")]
        misses = sum(entry["tries"] - entry["ok"] for entry in tried)
        if misses > 0:
            stuck = sum(not entry["ok"] for entry in tried)
            wrong.append(
                {"id": id, "title": titles.get(id, ""), "wrong": misses, "tried": len(tried), "not_right_yet": stuck}
            )
    wrong.sort(key=lambda row: (-row["not_right_yet"], -row["wrong"], row["id"]))
    exercises = {number: len(ids) for number, ids in sorted(lessons.items())}
    return {"learners": rows, "exercises": exercises, "often_wrong": wrong, "left_out": left_out}


def _columns(text: str) -> int:
    """How many columns of a terminal the text takes: Chinese signs take two, combining marks none."""
    return sum(0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _columns(text))


def _local(when: str) -> str:
    """`2026-11-23T10:00:00+00:00` as the clock on the wall showed it; nothing for nothing."""
    return f"{datetime.fromisoformat(when).astimezone():%Y-%m-%d %H:%M}" if when else ""


def show(figures: dict) -> None:
    """Print the table, the exercises that went wrong, the machines with problems."""
    numbers = list(figures["exercises"])
    width = max(_columns(row["name"]) for row in figures["learners"])
    print(
        f"{'':<{width}}  "
        + " ".join(f"{number:>4}" for number in numbers)
        + "  right exercises, lesson by lesson; when (local time)"
    )
    for row in figures["learners"]:
        cells = " ".join(f"{row['right'][n]}/{figures['exercises'][n]}".rjust(4) for n in numbers)
        state = "" if row["ready"] is not False else "  machine not ready"
        print(f"{_pad(row['name'], width)}  {cells}  {_local(row['when'])}{state}")
    if figures["often_wrong"]:
        print("\nmost often wrong")
    for row in figures["often_wrong"][:10]:
        learners = f"{row['not_right_yet']} of {row['tried']} who tried are not right yet"
        print(f"  {row['id']} {row['title']}: {learners}, {row['wrong']} wrong tries")
    troubled = [row for row in figures["learners"] if row["problems"]]
    print("\nmachines with problems" if troubled else "\nno machine has a problem")
    for row in troubled:
        for problem in row["problems"]:
            fix = f"; fix: {problem['fix']}" if problem["fix"] else ""
            print(f"  {row['name']}: {problem['name']}: {problem['value']}{fix}")
    for line in figures["left_out"]:
        print(f"left out or replaced: {line}")


def _labels(names: list[str]) -> list[str]:
    """The names as the picture can write them: `row 3` where its font has no such signs (Chinese, emoji)."""
    from matplotlib import font_manager

    from finetune_lab.course import plots

    font = font_manager.get_font(font_manager.findfont(plots.STYLE["font.family"]))
    return [
        name if all(font.get_char_index(ord(sign)) for sign in name) else f"row {row}"
        for row, name in enumerate(names, start=1)
    ]


def draw(figures: dict):
    """Learners by lessons as a grid: the number of right exercises in each field, the darker the more."""
    from finetune_lab.course import plots

    numbers, learners = list(figures["exercises"]), figures["learners"]
    shares = [[row["right"][n] / figures["exercises"][n] for n in numbers] for row in learners]
    half = [sum(row[i] >= 0.5 for row in shares) for i in range(len(numbers))]
    reached = [n for n, count in zip(numbers, half, strict=True) if count >= len(learners) / 2]
    message = f"have at least half of lesson {reached[-1]}" if reached else "have yet to finish half of a lesson"
    count = half[numbers.index(reached[-1])] if reached else len(learners)
    title = f"{count} of {len(learners)} {message}"
    tall = 1.2 + 0.32 * len(learners)
    figure, ax = plots.axes(title, "lesson (right exercises of all)", "", size=(1.8 + 0.55 * len(numbers), tall))
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.7, aspect="auto")
    for y, row in enumerate(learners):
        for x, n in enumerate(numbers):
            text = f"{row['right'][n]}/{figures['exercises'][n]}" if row["right"][n] else "·"
            ax.text(x, y, text, ha="center", va="center", color=plots.BLACK)
    ax.set_xticks(range(len(numbers)), numbers)
    names = _labels([row["name"] for row in learners])
    names = [name + (" (machine!)" if row["problems"] else "") for name, row in zip(names, learners, strict=True)]
    ax.set_yticks(range(len(names)), names, parse_math=False)  # a $ in a name is a $
    ax.grid(False)
    return figure


def _command(args: argparse.Namespace) -> int:
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        raise UserError(f"--plot {args.plot}: the picture is a PNG; give a name that ends in .png.")
    figures = overview(*collect(Path(args.folder)))
    if args.json:
        print(json.dumps(figures, indent=1))
    else:
        show(figures)
    if args.plot:
        from finetune_lab.course import plots

        try:
            Path(args.plot).write_bytes(plots.png(draw(figures)))
        except OSError as error:
            raise UserError(f"cannot write {args.plot}: {error.strerror or error}.") from None
        if not args.json:
            names = [row["name"] for row in figures["learners"]]
            pairs = [f"{label} is {name}" for label, name in zip(_labels(names), names, strict=True) if label != name]
            print(f"drawn in {args.plot}" + (f" ({', '.join(pairs)})" if pairs else ""))
    return 0


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "class",
        help="a class at a glance, from the files that learners hand in",
        description="Who is where, which exercises go wrong, which machines have problems: from a folder of the files "
        "that `finetune-lab doctor --class NAME` makes. Nothing is fetched from anywhere.",
        epilog="example: finetune-lab class handed-in --plot class.png",
    )
    parser.add_argument("folder", metavar="FOLDER", help="where the files are; folders in it are read too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw learners by lessons into this file")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(func=_command)
