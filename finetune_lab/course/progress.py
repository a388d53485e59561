"""The learner's progress: one small JSON file that survives kills, two notebooks at once, and bad edits.

Where: `$FINETUNE_LAB_HOME/progress.json`, else the user's data folder (`platformdirs.user_data_dir("finetune-lab")`).
What:

    {"schema": 1,
     "exercises":   {"01.2": {"title": .., "ok": "2026-11-23T10:00:00+00:00" or null, "tries": 3, "last": "wrong"}},
     "predictions": {"01-p1": {"first": 30, "guess": 80, "actual": 87.5, "unit": "%", "error": 57.5, "right": null}}}

`ok` is when the exercise was right for the first time and stays; `last` is the newest verdict (`ok`, `wrong` or
`not attempted`); `tries` counts the verdicts that were not `not attempted`. `error` is of the first guess.

A change is read-modify-write under a file lock (`filelock`: released by the system when a process dies), written to
a temporary file, flushed to disk and renamed. Nothing leaves this machine.
"""

import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_data_dir

from finetune_lab.errors import UserError

SCHEMA = 1


def home() -> Path:
    """The folder of the learner's files."""
    return Path(os.environ.get("FINETUNE_LAB_HOME") or user_data_dir("finetune-lab", appauthor=False))


def path() -> Path:
    return home() / "progress.json"


def _empty() -> dict:
    return {"schema": SCHEMA, "exercises": {}, "predictions": {}}


@contextmanager
def _locked(timeout: float = 15.0):
    try:
        home().mkdir(parents=True, exist_ok=True)
        with FileLock(home() / "progress.json.lock", timeout=timeout):
            yield
    except Timeout:
        raise UserError(
            f"another program holds {home() / 'progress.json.lock'}; close it and run the cell again."
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write progress in {home()} ({error.strerror or error}); "
            "set FINETUNE_LAB_HOME to a folder that you may write."
        ) from None


def _valid(data: object) -> bool:
    return (
        isinstance(data, dict)
        and isinstance(data.get("schema"), int)
        and (
            data["schema"] > SCHEMA
            or all(
                isinstance(data.get(part), dict) and all(isinstance(entry, dict) for entry in data[part].values())
                for part in ("exercises", "predictions")
            )
        )
    )


def _read() -> dict:
    """The file's content. Call it under the lock: a damaged file is moved aside here."""
    try:
        data = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _empty()
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        data = None
    if not _valid(data):
        number = 1
        while (aside := path().with_name(f"progress.json.corrupt-{number}")).exists():
            number += 1
        os.replace(path(), aside)
        print(f"progress: {path().name} was damaged; it was moved to {aside} and a new one starts.")
        return _empty()
    if data["schema"] > SCHEMA:
        raise UserError(
            f"{path()} was written by a newer finetune-lab (schema {data['schema']}, this one knows {SCHEMA}); "
            "it was left as it is. Upgrade finetune-lab, or set FINETUNE_LAB_HOME to another folder."
        )
    return data


def load() -> dict:
    """Everything recorded so far; an empty record when nothing was.

    Raises:
        UserError: the file is of a newer schema, or the folder cannot be used.
    """
    if not path().exists():
        return _empty()
    with _locked():
        return _read()


def _change(edit: Callable[[dict], None]) -> None:
    with _locked():
        data = _read()
        edit(data)
        # One name for the temporary file is enough under the lock, and a killed writer leaves no litter.
        temporary = path().with_name("progress.json.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_exercise(id: str, verdict: str, title: str = "") -> None:
    """Store one verdict: `ok`, `wrong` or `not attempted`."""

    def edit(data: dict) -> None:
        entry = data["exercises"].setdefault(id, {"ok": None, "tries": 0})
        entry["last"], entry["title"] = verdict, title
        entry["tries"] = entry.get("tries", 0) + (verdict != "not attempted")
        if verdict == "ok" and not entry.get("ok"):
            entry["ok"] = _now()

    _change(edit)


def record_prediction(id: str, guess, actual, unit: str = "") -> None:
    """Store a prediction. The first guess is the one that counts: `error` is |first - actual| for numbers,
    `right` is whether it was the answer for choices."""

    def edit(data: dict) -> None:
        entry = data["predictions"].setdefault(id, {"first": guess})
        entry.update(guess=guess, actual=actual, unit=unit)
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (entry["first"], actual))
        entry["error"] = abs(entry["first"] - actual) if numbers else None
        entry["right"] = None if numbers else entry["first"] == actual

    _change(edit)


def _put_aside(path: Path) -> Path:
    """Rename a file or a folder to `<name>.mine-YYYYMMDD-HHMMSS<suffix>` beside it; return the new path."""
    stamp, number = datetime.now().strftime("%Y%m%d-%H%M%S"), 1
    while (aside := path.with_name(f"{path.stem}.mine-{stamp}{f'-{number}' * (number > 1)}{path.suffix}")).exists():
        number += 1
    try:
        path.rename(aside)
    except OSError as error:
        raise UserError(
            f"cannot put {path} aside ({error.strerror or error}); close the drills and notebooks that are open, "
            "and run the command again."
        ) from None
    return aside


def start_again() -> list[Path]:
    """Put the learner's files aside: progress, the drills' log and their code; return where they are now."""
    # A journal that a killed drill left behind belongs to the log (drills/state.py) and goes with it.
    names = (path().name, "drills.sqlite", "drills.sqlite-journal", "drills")
    if not os.path.isdir(home()):
        return []
    with _locked():
        return [_put_aside(home() / name) for name in names if (home() / name).exists()]
