"""What runs inside the process of `sandbox`: limits first, then the learner's code, then the hidden tests.

`code` and `bug` are also called directly by the tests of the bank, on the bank's own code.
"""

import contextlib
import functools
import io
import json
import os
import random
import re
import signal
import sys
import traceback
import types
from pathlib import Path

import torch

from finetune_lab.course import checks
from finetune_lab.course.drills import exercises
from finetune_lab.course.drills.links import find

NAME = "<your code>"
_STARTS = (
    "os.fork",
    "os.forkpty",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "os.system",
    "subprocess.Popen",
    "pty.spawn",
)
_REFUSED: list[str] = []  # sentences, newest last


class Refused(RuntimeError):
    """The learner's code did what a drill may not do."""


def main(job: dict) -> None:
    """Judge `job` and print the verdict behind the nonce; then leave at once, whatever threads still run."""
    nonce, out = job.pop("nonce"), os.dup(1)
    if job["kind"] == "code":
        drill = exercises.get(job["exercise"])
        judge = functools.partial(code, drill, job["source"], job["seed"])
    else:
        detector = find(f"finetune_lab.course.drills.detectors:{job['detector']}")
        judge = functools.partial(bug, job["snippet"], detector)
    _forbid()
    _limit(**job["limits"])
    os.write(out, f"\x1e{nonce}".encode())
    try:
        status, text = judge()
    except BaseException as error:  # noqa: BLE001 (a learner's code may raise anything, anywhere)
        status, text = "again", f"the tests were broken off by {_error(error)}"
    if status != "ok" and _REFUSED:
        status, text = "again", _REFUSED[-1]
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(out, f"\x1e{nonce}{json.dumps({'status': status, 'text': text[:3000]})}\n".encode())
    os._exit(0)


def code(drill: checks.Exercise, source: str, seed: int) -> tuple[str, str]:
    """Status and sentence for a learner's whole code: it must define `drill.name`."""
    namespace = _module("answer")
    problem = load(source, namespace)
    if problem:
        return "again", problem
    if drill.name not in namespace:
        return "again", f"your code does not define {drill.name}"
    verdict = checks.judge(drill, namespace[drill.name], seed)
    if verdict.status == "not attempted":
        return verdict.status, "this is the starter: write your code"
    lines = [line for line in verdict.text.split("\n") if not line.startswith("    the same cases again")]
    return _reworded(verdict.status, "\n".join(lines))


def bug(snippet: str, detector) -> tuple[str, str]:
    """Status and sentence for a repaired snippet: ok when the detector finds nothing."""
    torch.manual_seed(0)
    random.seed(0)
    namespace = _module("snippet")
    problem = load(snippet, namespace)
    if problem:
        return "again", problem
    try:
        caught = detector(namespace)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the repaired code may raise anything)
        return _reworded("wrong", f"with your line the code raised {_error(error)}")
    return ("ok", "") if caught is None else _reworded("wrong", str(caught))


def _module(name: str) -> dict:
    """The namespace of a fresh module: dataclasses, for one, look theirs up in sys.modules."""
    sys.modules[name] = types.ModuleType(name)
    return vars(sys.modules[name])


def load(source: str, namespace: dict) -> str | None:
    """Execute `source` in `namespace`; a sentence when it does not load."""
    try:
        exec(compile(source, NAME, "exec"), namespace)  # noqa: S102 (that is what this process is for)
    except SyntaxError as error:
        return f"line {error.lineno or '?'}: Python cannot read this ({error.msg})"
    except ModuleNotFoundError as error:
        return f"line {_line(error)}: there is no module {error.name!r} here: use torch and the standard library"
    except SystemExit:
        return "your code calls sys.exit(): define the function and return a value instead"
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        return _reworded("again", f"your code does not load: line {_line(error)} raised {_error(error)}")[1]
    return None


def _line(error: BaseException) -> int | str:
    """The last line of the learner's code in the traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == NAME]
    return lines[-1] if lines else "?"


def _error(error: BaseException) -> str:
    try:
        words = " ".join(str(error).split())[:200]
    except Exception:  # noqa: BLE001
        words = ""
    return f"{type(error).__name__}{': ' + words if words else ''}"


def _reworded(status: str, text: str) -> tuple[str, str]:
    """Errors that say little to a learner, in words."""
    if re.search(r"raise[ds] (MemoryError|RuntimeError: .*allocate memory)", text):
        return "again", "your code asks for more memory than a drill may have: work on smaller tensors"
    if re.search(r"raise[ds] SystemExit", text):
        return "wrong", "your code calls sys.exit(): return a value instead"
    if missing := re.search(r"raise[ds] ModuleNotFoundError: No module named (\S+)", text):
        return "again", f"there is no module {missing[1]} here: use torch and the standard library"
    if re.search(r"raise[ds] RecursionError", text):
        return status, "your code calls itself without end (RecursionError)"
    return status, text


class _NoKeyboard(io.TextIOBase):
    def readline(self, *args):
        _refuse("your code waits for the keyboard: a drill gets its data as arguments")

    read = __next__ = readline


def _refuse(sentence: str):
    _REFUSED.append(sentence)
    raise Refused(sentence)


def _forbid() -> None:
    """No keyboard, and no other programs."""
    sys.stdin = _NoKeyboard()

    def hook(event: str, args) -> None:
        if event in _STARTS:
            _refuse(f"your code starts another process ({event}): a drill stays in its own")

    sys.addaudithook(hook)


def _limit(cpu: float, wall: float, memory: int, **others) -> None:
    """The limits of the system, counted from here; a limit that this system does not know is left out."""
    if hasattr(signal, "alarm"):
        signal.alarm(int(wall) + 30)  # ends us if the parent was killed
    try:
        import resource
    except ImportError:  # Windows
        return
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _set(resource, "RLIMIT_CPU", int(used + cpu) + 1)
    _set(resource, "RLIMIT_CORE", 0)
    _set(resource, "RLIMIT_FSIZE", 16 * 2**20)
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        _set(resource, "RLIMIT_DATA", int(re.search(r"VmData:\s+(\d+)", status)[1]) * 1024 + memory)


def _set(resource, name: str, value: int) -> None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        hard = resource.getrlimit(getattr(resource, name))[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, name), (soft, hard))
