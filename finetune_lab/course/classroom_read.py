"""Read the files that learners hand in (classroom.py says what is in one) for `finetune-lab class FOLDER`.

A `progress.json` that somebody copied into the folder is read too; its name is the file's, or its folder's. The files
are other people's: their form is checked, and signs that steer a terminal are taken out. They come through mail,
PowerShell and Windows: UTF-16, marks of byte order, `.JSON` and `.json.txt` are read. What is left out is said.
"""

import codecs
import json
import re
from datetime import UTC, datetime
from pathlib import Path

from finetune_lab.course.classroom import SCHEMA
from finetune_lab.errors import UserError

_ODD = "not a file of `finetune-lab doctor --class NAME`"


def _clean(text: object, limit: int = 200) -> str:
    """Text of somebody else's file as it may be printed: one line, no control signs."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())[:limit]


def _time(text: object) -> str:
    """A time as ISO text in UTC; nothing when it is not one."""
    try:
        time = datetime.fromisoformat(text)
        time = (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
        return time.isoformat(timespec="seconds") if 2000 <= time.year < 9000 else ""  # every clock can show it
    except (TypeError, ValueError, OverflowError):
        return ""


def _entry(data: object, alone: str) -> dict | str:
    """One learner from one JSON value, or why it is none. `alone` is the name where the value has no name."""
    if not isinstance(data, dict):
        return _ODD
    version = data.get("class", data.get("schema", SCHEMA))
    if isinstance(version, int) and version > SCHEMA:
        return "made by a newer finetune-lab; update yours, then run this again"
    if version != SCHEMA or not isinstance(data.get("exercises"), dict):
        return _ODD
    exercises = {}
    for id, entry in data["exercises"].items():
        if not re.fullmatch(r"[0-9]{2}\.[0-9]+", id) or not isinstance(entry, dict):
            return _ODD
        tries = entry.get("tries", 0)
        if not isinstance(tries, int) or not 0 <= tries < 1_000_000:
            return _ODD
        exercises[id] = {"ok": bool(entry.get("ok")), "tries": tries}
    problems = data.get("problems", [])
    if not isinstance(problems, list) or not all(isinstance(problem, dict) for problem in problems):
        return _ODD
    return {
        "name": _clean(data.get("name") or alone, 40) or "(no name)",
        "when": _time(data.get("when")),
        "ready": data.get("ready") if isinstance(data.get("ready"), bool) else None,
        "exercises": exercises,
        "problems": [{key: _clean(problem.get(key, "")) for key in ("name", "value", "fix")} for problem in problems],
    }


def _text(raw: bytes) -> str:
    """The file's text: UTF-8, or the UTF-16 of PowerShell's `>`; the marks at the start, or where files were joined,
    are taken out."""
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if wide else "utf-8").replace("\ufeff", "")


def _entries(path: Path) -> list[tuple[str, dict | str]]:
    """(where, learner or why it is none) for the file's JSON: one value, or one a line."""
    alone = path.name.split(".")[0]
    alone = alone if alone != "progress" else path.resolve().parent.name
    try:
        text = _text(path.read_bytes())
    except OSError as error:
        return [("", f"cannot be read ({error.strerror or error})")]
    except ValueError:
        return [("", _ODD)]
    try:
        return [("", _entry(json.loads(text), alone))]
    except (ValueError, RecursionError):
        found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                found.append((f", line {number}", _entry(json.loads(line), alone)))
            except (ValueError, RecursionError):
                found.append((f", line {number}", _ODD))
    if all(isinstance(entry, str) for _, entry in found):  # not lines of learners: the file is something else
        return [("", found[0][1] if len(found) == 1 else _ODD)]
    return found


def collect(folder: Path) -> tuple[list[dict], list[str]]:
    """(learners by name, what was left out and why). Of two files with one name the newer counts.

    Raises:
        UserError: there is no such folder, or nothing readable in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; put the files of `finetune-lab doctor --class NAME` into one.")
    found, left_out = {}, []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file, low = _clean(path.relative_to(folder).as_posix()), path.name.lower()
        if not low.endswith((".json", ".json.txt")):
            if low.startswith("class-"):
                left_out.append(f"{file}: its name does not end in .json")
            continue
        for line, entry in _entries(path):
            where = file + line
            if isinstance(entry, str):
                left_out.append(f"{where}: {entry}")
                continue
            name = entry["name"]
            if name in found:
                other, there = found[name]
                winner = there if other["when"] > entry["when"] else where
                why = "the last one read" if other["when"] == entry["when"] else "the newer one"
                left_out.append(
                    f"{there} and {where} both say they are {name}; {winner} counts, {why} "
                    "(two people? then one of them takes another name)"
                )
                if winner == there:
                    continue
            found[name] = (entry, where)
    if not found:
        why = f" ({left_out[0]})" if left_out else ""
        raise UserError(
            f"no file of a learner in {folder}{why}: everybody makes one by `finetune-lab doctor --class NAME`."
        )
    return sorted((entry for entry, _ in found.values()), key=lambda learner: learner["name"].lower()), left_out
