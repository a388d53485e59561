"""Run a learner's code in a process of its own, with limits: `run(job)` always returns, with one sentence.

The process is `python -I` in a fresh temporary folder, without a GPU and with one thread. Its limits:

    time      CPU seconds by the system (`resource`, where there is one) and wall seconds by us; start-up is not counted
    memory    what it may allocate after torch is loaded, by RLIMIT_DATA (Linux). RLIMIT_AS would also count the address
              space that CUDA builds of torch only reserve. macOS and Windows: no limit
    output    what it may print; more ends it
    programs  starting others is refused (an audit hook); whatever runs in its process group is killed at the end

A verdict counts only with a random word (the nonce) that the parent made for this run, so that code which prints
something and calls os._exit(0) has not passed. These limits are against accidents. They are no wall against somebody
who attacks their own machine.
"""

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

BOOT = (
    "import json, sys; job = json.loads(sys.stdin.buffer.read()); sys.path[:] = job['path']; "
    "from finetune_lab.course.drills import child; child.main(job)"
)
SHOWN = 2000  # characters of what was printed


@dataclass(frozen=True)
class Limits:
    """Seconds of CPU and of wall time after start-up, seconds for start-up, bytes of memory, bytes of output."""

    cpu: float = 10
    wall: float = 30
    start: float = 120
    memory: int = 2 * 2**30
    output: int = 64 * 1024


@dataclass(frozen=True)
class Result:
    """`status`: ok, wrong, not attempted or again (see `judge.Verdict`)."""

    status: str
    text: str
    printed: str = ""


class _Output(threading.Thread):
    """Reads what the process prints, so that it never waits for us, and remembers the newest part."""

    def __init__(self, pipe, nonce: bytes):
        super().__init__(daemon=True)
        self.pipe, self.mark, self.data = pipe, b"\x1e" + nonce, bytearray()
        self.ready_at: float | None = None

    def run(self):
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self.pipe.fileno(), 2**16):
                if len(self.data) < 2**22:  # a flood is ended by `run` below; until then it must not fill our memory
                    self.data += chunk
                if self.ready_at is None and self.mark in self.data:
                    self.ready_at = time.monotonic()

    def parts(self) -> tuple[str, str, str]:
        """What came before the process was ready, what the learner's code printed, and the result as JSON."""
        before, *after = bytes(self.data).split(self.mark)
        text = [part.decode("utf-8", "replace") for part in (before, *after)]
        return text[0], text[1] if after else "", text[2] if len(after) > 1 else ""


def run(job: dict, limits: Limits | None = None) -> Result:
    """Run `child.main` on `job` in a process of its own.

    job: {"kind": "code", "exercise", "source", "seed"} or {"kind": "bug", "snippet", "detector"}.
    """
    limits, nonce = limits or Limits(), secrets.token_hex(16)
    if job.get("seed", 0) is None:
        job = {**job, "seed": random.SystemRandom().randrange(100_000)}
    job = {**job, "path": [os.path.abspath(p) for p in sys.path if p], "nonce": nonce, "limits": vars(limits)}
    with tempfile.TemporaryDirectory(prefix="finetune-lab-drill-", ignore_cleanup_errors=True) as folder:
        try:
            process = _start(folder)
        except OSError as error:
            return Result("again", f"the tests could not be started: {error.strerror or error}")
        output = _Output(process.stdout, nonce.encode())
        try:
            output.start()
            with contextlib.suppress(OSError):  # it may have died at once
                process.stdin.write(json.dumps(job).encode())
                process.stdin.close()
            ended = _wait(process, output, limits)
        finally:
            _kill(process)
            output.join(5)
            process.stdout.close()
    return _result(process.returncode, output, ended, limits)


def _start(folder: str) -> subprocess.Popen:
    new_group = {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x200}  # NEW_PROCESS_GROUP
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": folder, "FINETUNE_LAB_HOME": folder}
    return subprocess.Popen(
        [sys.executable, "-I", "-c", BOOT],
        cwd=folder,
        env={**os.environ, **own},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **new_group,
    )


def _wait(process: subprocess.Popen, output: _Output, limits: Limits) -> str:
    """Until it ends by itself ("") or has to be ended ("time", "output" or "start")."""
    begin = time.monotonic()
    while True:
        output.join(0.02)
        if not output.is_alive():  # nobody holds its output any more: it has ended, or closed it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limits.wall)
                return ""
            return "time"
        if output.ready_at is None:
            if time.monotonic() - begin > limits.start:
                return "start"
        elif len(output.data) > limits.output + 2**16:  # what came before it was ready is part of it
            return "output"
        elif output.parts()[2].endswith("\n"):  # a verdict, though something still holds the output
            return ""
        elif time.monotonic() - output.ready_at > limits.wall:
            return "time"


def _kill(process: subprocess.Popen) -> None:
    """End the process and all that it started. Its group is only killed while the process is still ours (not reaped)."""
    if process.returncode is None:
        with contextlib.suppress(OSError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def _result(code: int | None, output: _Output, ended: str, limits: Limits) -> Result:
    before, printed, verdict = output.parts()
    printed = "".join(c for c in printed if c.isprintable() or c in "\n\t")  # no escape sequences on a terminal
    printed = printed if len(printed) <= SHOWN else printed[:SHOWN] + " ..."
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(verdict)
        return Result(found["status"], found["text"], printed)
    endless = f"your code did not end within {limits.wall:g} s: is there an endless loop?"
    if output.ready_at is None and ended != "output":
        why = "it took too long" if ended == "start" else (before.strip().splitlines() or [f"exit code {code}"])[-1]
        return Result("again", f"the tests could not be started ({why[:200]}): run `finetune-lab doctor`")
    if ended == "output":
        return Result("again", f"your code printed more than {limits.output // 1024} kB: take out what prints", printed)
    if ended == "time":
        return Result("again", endless, printed)
    if code == -getattr(signal, "SIGXCPU", 0) and code:
        text = f"your code used more than {limits.cpu:g} s of processor time: is there an endless loop?"
    elif code == -getattr(signal, "SIGKILL", 0) and code:
        text = "your code was killed by the system, most likely because it used too much memory"
    elif code is not None and code < 0:
        text = f"your code crashed Python ({signal.Signals(-code).name})"
    else:
        text = "your code ended the program before the tests were done: return a value instead of leaving (os._exit)"
    return Result("again", text, printed)
