"""Where a recorded figure comes from: the day, the machine and the versions that made it."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def provenance() -> dict:
    """{"date", "machine", "versions"} of this run, for recorded benches and recorded lessons."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "finetune-lab")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def machine() -> dict[str, object]:
    return {"system": platform.system(), "arch": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count()}


def git_state(folder: Path = Path()) -> dict[str, object] | None:
    """{"commit", "changed"} of the git repository around `folder`; None when there is none, or no git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _cpu() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
