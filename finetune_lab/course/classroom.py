"""The file of `finetune-lab doctor --class NAME`, which a learner hands to the instructor (classroom_table.py reads it).

A learner makes the file, looks at it and hands it over; nothing is sent. It is one line of JSON, so that many of them
may also be joined into one file:

    {"class": 1, "name": "anna", "when": "2026-11-23T10:00:00+00:00", "ready": true,
     "machine": {"system": .., "python": .., "cores": .., "memory_gb": .., "gpu": ..},
     "versions": {"torch": "2.13.0", ..}, "problems": [{"name": .., "value": .., "fix": ..}],
     "exercises": {"01.2": {"ok": true, "tries": 3}}, "predictions": {"01-p1": {"right": null, "error": 57.5}}}

In it: the name that the learner typed, what `doctor` found, and for each exercise and prediction how it went. Not in it:
code, guesses, the user's name, paths of the home folder.
"""

import getpass
import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

from finetune_lab.errors import UserError

SCHEMA = 1
SAID = (
    "It holds the name you typed, versions and problems of this machine, and for each exercise and prediction "
    "how it went; no code, no guesses, no account name. Nothing was sent: look at it, then hand it to your instructor."
)


def file_name(name: str) -> str:
    """`class-NAME.json`.

    Raises:
        UserError: the name has other signs than letters, digits, - and _, or more than 40.
    """
    if not re.fullmatch(r"[\w-]{1,40}", name):
        raise UserError(f"--class {name!r}: choose a name of 1 to 40 letters, digits, - or _, for example anna-3.")
    return f"class-{name}.json"


def _without_account(text: str) -> str:
    """A finding of the doctor without the home folder's path and the account's name."""
    home = str(Path.home())
    text = text.replace(home, "~") if len(home) > 1 else text
    try:
        return re.sub(rf"\b{re.escape(getpass.getuser())}\b", "(account)", text)
    except (OSError, KeyError, ImportError):  # an account without a name
        return text


def record(name: str, report: dict) -> dict:
    """What the learner hands over: see the head of this module. `report` is what doctor.examine() gives."""
    from finetune_lab.course import doctor, progress

    done, (total, _) = progress.load(), doctor.memory()
    rows = {row["name"]: row for row in report["rows"]}
    return {
        "class": SCHEMA,
        "name": name,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "ready": report["ok"],
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "memory_gb": None if total is None else round(total / 1e9, 1),
            "gpu": rows["GPU"]["value"] if rows.get("GPU", {}).get("level") == "ok" else None,
        },
        "versions": report["versions"],
        "problems": [
            {key: _without_account(row[key]) for key in ("name", "value", "fix")}
            for row in report["rows"]
            if row["level"] in ("problem", "blocked")
        ],
        "exercises": {
            id: {"ok": bool(entry.get("ok")), "tries": entry.get("tries", 0)}
            for id, entry in sorted(done["exercises"].items())
        },
        "predictions": {
            id: {"right": entry.get("right"), "error": entry.get("error")}
            for id, entry in sorted(done["predictions"].items())
        },
    }


def write(name: str, report: dict) -> Path:
    """Write the learner's file into the current folder and return its path."""
    path = Path(file_name(name))
    try:
        path.write_text(json.dumps(record(name, report)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); go to a folder that you may write."
        ) from None
    return path
