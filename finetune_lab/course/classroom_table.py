"""`finetune-lab class FOLDER`: a class at a glance, from the files that learners hand in (classroom.py says what is in one).

Who is where, which exercises go wrong, which machines have problems. A `progress.json` that somebody copied into the
folder is read too; its name is the file's, or its folder's. The files are other people's: their form is checked, and
signs that steer a terminal are taken out. A file of something else is named and left out.
"""

import argparse
import json
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from finetune_lab.course.classroom import SCHEMA
from finetune_lab.errors import UserError


def _clean(text: object, limit: int = 200) -> str:
    """Text of somebody else's file as it may be printed: one line, no control signs."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())[:limit]


def _entry(data: object, path: Path) -> dict | None:
    """One learner from one JSON value, or None when it is something else."""
    if not isinstance(data, dict) or not isinstance(data.get("exercises"), dict):
        return None
    if "class" in data and data["class"] != SCHEMA:
        return None
    alone = path.stem if path.stem != "progress" else path.resolve().parent.name
    exercises = {}
    for id, entry in data["exercises"].items():
        if not re.fullmatch(r"\d\d\.\d+", id) or not isinstance(entry, dict):
            return None
        tries = entry.get("tries", 0)
        if not isinstance(tries, int) or not 0 <= tries < 1_000_000:
            return None
        exercises[id] = {"ok": bool(entry.get("ok")), "tries": tries}
    problems = data.get("problems", [])
    if not isinstance(problems, list) or not all(isinstance(problem, dict) for problem in problems):
        return None
    return {
        "name": _clean(data.get("name") or alone, 40) or "(no name)",
        "when": _clean(data.get("when", ""), 25),
        "ready": data.get("ready") if isinstance(data.get("ready"), bool) else None,
        "exercises": exercises,
        "problems": [{key: _clean(problem.get(key, "")) for key in ("name", "value", "fix")} for problem in problems],
    }


def _values(text: str) -> list[object]:
    """The file's JSON: one value, or one a line."""
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def collect(folder: Path) -> tuple[list[dict], list[str]]:
    """(learners by name, what was left out and why). Of two files with one name the newer counts.

    Raises:
        UserError: there is no such folder, or nothing readable in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; put the files of `finetune-lab doctor --class NAME` into one.")
    found, left_out = {}, []
    for path in sorted(folder.rglob("*.json")):
        try:
            entries = [_entry(value, path) for value in _values(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, RecursionError):
            entries = []
        if not entries or None in entries:
            left_out.append(f"{path.name}: not a file of `finetune-lab doctor --class NAME`")
            continue
        for entry in entries:
            other = found.get(entry["name"])
            if other:
                left_out.append(f"{path.name}: another file says it is {entry['name']} too; the newer one counts")
            if not other or entry["when"] >= other["when"]:
                found[entry["name"]] = entry
    if not found:
        raise UserError(f"no file of a learner in {folder}: everybody makes one by `finetune-lab doctor --class NAME`.")
    return sorted(found.values(), key=lambda learner: learner["name"].lower()), left_out


def overview(learners: list[dict], left_out: list[str]) -> dict:
    """The figures of a class: progress by learner and lesson, exercises by wrong tries, machines with problems."""
    from finetune_lab.course import check

    titles = {exercise.id: exercise.title for exercise in check.load_all().values()}
    lessons = defaultdict(set)
    for id in titles:
        lessons[id[:2]].add(id)
    for learner in learners:
        for id in learner["exercises"]:
            lessons[id[:2]].add(id)
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


def show(figures: dict) -> None:
    """Print the table, the exercises that went wrong, the machines with problems."""
    numbers = list(figures["exercises"])
    width = max(_columns(row["name"]) for row in figures["learners"])
    print(f"{'':<{width}}  " + " ".join(f"{number:>4}" for number in numbers) + "  right exercises, lesson by lesson")
    for row in figures["learners"]:
        cells = " ".join(f"{row['right'][n]}/{figures['exercises'][n]}".rjust(4) for n in numbers)
        state = "" if row["ready"] is not False else "  machine not ready"
        print(f"{_pad(row['name'], width)}  {cells}  {row['when'][:16].replace('T', ' ')}{state}")
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
