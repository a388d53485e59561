"""`finetune-lab run`, `status` and `reset`: execute lessons, see how far you are, start a lesson again.

`run` executes copies in memory: the learner's notebook is never written. `reset` never loses what the learner wrote:
it is copied to `NN_name.mine-YYYYMMDD-HHMMSS.ipynb` first.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import nbformat
from tqdm import tqdm

from finetune_lab.course import exercises, progress
from finetune_lab.course.lessons import Lesson, course_root, keep_mine, lessons, select, write_atomic
from finetune_lab.errors import UserError
from finetune_lab.provenance import provenance


def run_lesson(lesson: Lesson, tree: str, model: str | None, timeout: float, save: Path | None = None) -> dict:
    """Execute one lesson and return its row: lesson, tree, seconds, cells (run), failures, first (cell and error).

    Solutions run with FINETUNE_LAB_CHECK=solved; notebooks as the learner has them, with `learn`.
    """
    from finetune_lab.course import execute

    path = lesson.solution if tree == "solutions" else lesson.notebook
    if not path.exists():
        raise UserError(
            f"{path.parent.name}/{path.name} does not exist; make it with: finetune-lab build {lesson.number}"
        )
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception:  # noqa: BLE001 (nbformat raises many kinds for a damaged file)
        raise UserError(
            f"{path.parent.name}/{path.name} is not a notebook (damaged?); a fresh copy, yours kept beside it: "
            f"finetune-lab reset {lesson.number}"
        ) from None
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None  # of an earlier run
    settings = {"FINETUNE_LAB_CHECK": "solved"} if tree == "solutions" else {}
    if model:
        settings["FINETUNE_LAB_MODEL"] = model
    with tqdm(total=len(cells), desc=lesson.name, unit="cell", leave=False, disable=None) as bar:
        seconds, broke = execute.run(notebook, path.parent, settings, timeout, on_cell=bar.update)
    failures = execute.failures(notebook)
    done = sum(cell.get("execution_count") is not None for cell in cells)
    if broke:  # its interrupt left an error in the cell: not a second failure
        last = cells[max(done - 1, 0)].get("id", str(done))
        failures = [failure for failure in failures if failure[0] != last] + [(last, broke)]
    if save:
        write_atomic(save / path.name, nbformat.writes(notebook, version=4) + "\n")
    first = {"cell": failures[0][0], "error": failures[0][1]} if failures else None
    return {"lesson": lesson.name, "tree": tree, "seconds": round(seconds, 1), "cells": done,
            "failures": len(failures), "first": first}  # fmt: skip


def _model(name: str | None) -> str | None:
    """The model as a kernel in another folder can find it; fetched before the first lesson starts."""
    name = name or os.environ.get("FINETUNE_LAB_MODEL")
    if not name or name == "tiny":
        return name
    from finetune_lab.lab import models

    models.locate(name)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _run(args: argparse.Namespace) -> int:
    chosen = select(course_root(args.root), args.lessons)
    if args.timeout <= 0:
        raise UserError(f"--timeout is {args.timeout:g}; give the seconds that one cell may take, more than 0.")
    model = _model(args.model)
    save = Path(args.save).resolve() if args.save else None
    if save and save in {lesson.notebook.parent for lesson in chosen} | {lesson.solution.parent for lesson in chosen}:
        raise UserError(f"--save {args.save} would overwrite the course's own notebooks; name another folder.")
    rows = [run_lesson(lesson, args.tree, model, args.timeout, save) for lesson in chosen]
    failed = sum(row["failures"] > 0 for row in rows)
    if args.json:
        figures = {"model": model or "tiny", "tree": args.tree, **provenance(), "rows": rows, "failed": failed}
        print(json.dumps(figures, indent=1))
    else:
        width = max(len(row["lesson"]) for row in rows)
        print(f"{'lesson':<{width}}  seconds  cells  failures")
        for row in rows:
            print(f"{row['lesson']:<{width}}  {row['seconds']:>7.1f}  {row['cells']:>5}  {row['failures']:>8}")
            if row["first"]:
                print(f"    first: cell {row['first']['cell']}: {row['first']['error']}")
        total = sum(row["seconds"] for row in rows)
        print(f"{len(rows)} lessons, {failed} failed, {total / 60:.1f} minutes, model {model or 'tiny'}")
    return 1 if failed else 0


def overview(root: Path | None) -> dict:
    """What `status` prints: every lesson with its exercises (`ok`, `tried`, `not yet`), and the predictions."""
    recorded = progress.load()
    rows = {id: {"id": id, "title": title, "state": "not yet", "tries": 0} for id, title in exercises.titles().items()}
    for id, entry in recorded["exercises"].items():
        row = rows.setdefault(id, {"id": id, "title": entry.get("title", "")})
        row["tries"] = entry.get("tries", 0)
        row["state"] = "ok" if entry.get("ok") else "tried" if row["tries"] else "not yet"
    names = {lesson.number: lesson.name for lesson in lessons(root)} if root else {}
    numbers = sorted({*names, *(id[:2] for id in rows)})
    table = [
        {"lesson": names.get(number, number), "exercises": [rows[id] for id in sorted(rows) if id[:2] == number]}
        for number in numbers
    ]
    predictions = [{"id": id, **entry} for id, entry in sorted(recorded["predictions"].items())]
    return {"file": str(progress.path()), "lessons": table, "predictions": predictions}


def _status(args: argparse.Namespace) -> int:
    try:
        root = course_root(args.root)
    except UserError:
        if args.root:
            raise
        root = None  # installed without the lessons: what was recorded can still be shown
    data = overview(root)
    if args.json:
        print(json.dumps(data, indent=1))
        return 0
    mark = {"ok": "[ok]", "tried": "[x]", "not yet": "[ ]"}
    for lesson in data["lessons"]:
        done = sum(row["state"] == "ok" for row in lesson["exercises"])
        print(f"{lesson['lesson']}: {done} of {len(lesson['exercises'])} exercises")
        for row in lesson["exercises"]:
            tries = f"  (not right yet, tries: {row['tries']})" if row["state"] == "tried" else ""
            print(f"  {mark[row['state']]:<4} {row['id']} {row['title']}{tries}")
    if data["predictions"]:
        print("predictions (your first guess counts)")
    for row in data["predictions"]:
        said = f"you said {row.get('first')}, it was {_short(row.get('actual'))} {row.get('unit', '')}".rstrip()
        off = "right" if row.get("right") else "wrong" if row.get("error") is None else f"off by {row['error']:.4g}"
        print(f"  {row['id']}: {said}: {off}")
    file = Path(data["file"])
    print(f"recorded in {file}" if file.exists() else f"nothing is recorded yet in {file.parent}")
    return 0


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def reset(lesson: Lesson) -> Path | None:
    """Put a fresh copy of the learner's notebook in place; return where the learner's own was kept (None: no need)."""
    from finetune_lab.course import build

    fresh, path = build.learner_notebook(lesson), lesson.notebook
    if path.exists() and path.read_bytes() == fresh.encode():
        return None
    kept = keep_mine(path) if path.exists() else None
    write_atomic(path, fresh)
    return kept


def _reset(args: argparse.Namespace) -> int:
    if bool(args.lessons) == args.all:
        raise UserError("name the lessons to reset (finetune-lab reset 01), or all of them by --all, not both.")
    if args.progress and not args.all:
        raise UserError("--progress forgets every lesson's verdicts; it goes only together with --all.")
    failed = 0
    for lesson in select(course_root(args.root), args.lessons):
        try:
            existed = lesson.notebook.exists()
            kept = reset(lesson)
        except (OSError, UserError) as error:  # one lesson that cannot be reset does not stop the others
            failed += 1
            why = error
            if isinstance(error, OSError):
                why = f"{error.strerror or error}; it must be readable, and its folder writable."
            print(f"finetune-lab: {lesson.notebook} was not reset: {why}", file=sys.stderr)
            continue
        if kept:
            print(f"{lesson.notebook.name} is fresh; yours is {kept.name} beside it")
        else:
            print(
                f"{lesson.notebook.name} {'is already as it was delivered' if existed else 'was missing; it is back'}"
            )
    if args.progress:
        kept = progress.start_again()
        print("progress and drills start again" if kept else "progress and drills were empty")
        for path in kept:
            print(f"  the old one is {path}")
    return 2 if failed else 0


def register(subparsers) -> None:
    run = subparsers.add_parser(
        "run",
        help="execute lessons; print seconds and failures",
        description="Execute lessons in memory and print seconds and failures. No notebook is changed.",
        epilog="example: finetune-lab run 00 01 --tree solutions --model smollm2-135m",
    )
    run.add_argument("lessons", nargs="*", metavar="NN", help="lesson numbers; all when none is given")
    run.add_argument(
        "--tree", choices=["notebooks", "solutions"], default="notebooks", help="default: notebooks (yours)"
    )
    run.add_argument("--model", help="tiny (default), smollm2-135m, a hub id or a folder")
    run.add_argument("--save", metavar="DIR", help="write the executed copies into this folder")
    run.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds that one cell may take (600)")
    run.add_argument("--json", action="store_true", help="print the table as JSON")
    run.set_defaults(func=_run)
    status = subparsers.add_parser(
        "status",
        help="your progress, lesson by lesson",
        description="Which exercises are right, which were tried, and how good your predictions were.",
        epilog="example: finetune-lab status",
    )
    status.add_argument("--json", action="store_true", help="print the same as JSON")
    status.set_defaults(func=_status)
    fresh = subparsers.add_parser(
        "reset",
        help="a fresh copy of a lesson; yours is kept beside it",
        description="Replace notebooks/NN_name.ipynb by a fresh copy. Yours is kept as NN_name.mine-DATE-TIME.ipynb.",
        epilog="example: finetune-lab reset 01",
    )
    fresh.add_argument("lessons", nargs="*", metavar="NN", help="lesson numbers")
    fresh.add_argument("--all", action="store_true", help="every lesson: for the next person at this machine")
    fresh.add_argument("--progress", action="store_true", help="with --all: progress and drills start again too; "
                       "the old files are kept beside")  # fmt: skip
    fresh.set_defaults(func=_reset)
    for parser in (run, status, fresh):
        parser.add_argument("--root", help="the course folder (default: found from here)")
