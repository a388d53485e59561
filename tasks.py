#!/usr/bin/env python3
"""Set up, open, test: `python tasks.py lab | test | install | build | doctor | format | clean`.

Standard library only; works on Linux, macOS and Windows. The Makefile and CI only call this file.

Everything goes into the folder .venv beside this file (FINETUNE_LAB_VENV names another one). An install that was
broken off is thrown away and done again; an install that is complete and up to date is left alone.
With `--here`, install nothing and use the Python that runs this file: for conda and for your own environments.
FINETUNE_LAB_TORCH_INDEX: the package index to take torch from (docs/places.md, "CPU-only and CUDA").
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("FINETUNE_LAB_VENV") or ROOT / ".venv").resolve()
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "finetune-lab-installed"  # holds the hash of what was installed; written last
BUSY = VENV / "finetune-lab-installing"  # there while an install runs: whoever finds it, finds a broken one
FIRST = ROOT / "notebooks" / "00_start_here.ipynb"
OLDEST = (3, 11)

# No question about news, no look for updates: JupyterLab would otherwise ask before the first cell is seen.
JUPYTERLAB = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}


def say(text):
    print(f"[tasks] {text}", flush=True)


def stop(text):
    sys.exit(f"[tasks] {text}")


def run(*command, env=None):
    """Run a command in the repository, print it first, return its exit code."""
    words = [str(word) for word in command]
    say("$ " + " ".join([Path(words[0]).name, *words[1:]]))
    return subprocess.call(words, cwd=ROOT, env=env or environment())


def environment(**extra):
    """The environment of everything started here: only this virtual environment's packages and kernels."""
    env = {**os.environ, "PYTHONNOUSERSITE": "1", "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONUTF8": "1", **extra}
    env["PATH"] = os.pathsep.join(
        [str(Path(PYTHON).parent), env.get("PATH", "")]
    )  # JupyterLab's terminal finds finetune-lab
    env.pop("PYTHONPATH", None)
    env.pop("PYTHONHOME", None)
    return env


# ---- install ------------------------------------------------------------------------------------------------------


def wanted():
    """A hash of everything that decides what is installed."""
    parts = [(ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml")]
    return hashlib.sha256(b"\0".join([*parts, str(ROOT).encode(), str(sys.version_info[:2]).encode()])).hexdigest()


def usable():
    """Does the virtual environment have a Python and a pip that start?"""
    if not PYTHON.exists():
        return False
    return subprocess.call([str(PYTHON), "-c", "import pip"], env=environment(), stderr=subprocess.DEVNULL) == 0


def create():
    say(f"creating a virtual environment in {VENV} (Python {platform.python_version()})")
    VENV.mkdir(parents=True, exist_ok=True)
    BUSY.touch()
    try:
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(VENV)
    except (subprocess.CalledProcessError, OSError) as error:
        stop(
            f"could not create a virtual environment ({error}). On Debian and Ubuntu, install the package "
            "python3-venv first: sudo apt install python3-venv"
        )


def install(force=False):
    """Bring .venv to what constraints.txt says; do nothing when it is there already."""
    if sys.version_info < OLDEST:
        stop(
            f"this is Python {platform.python_version()}, the course needs 3.11 or newer. "
            "Start this file with a newer one (with make: `make lab PYTHON=python3.11`)."
        )
    if not force and STAMP.exists() and not BUSY.exists() and STAMP.read_text() == wanted() and usable():
        say(f"{VENV} is complete and up to date")
        return
    if BUSY.exists():
        say("the last install was broken off: starting again from an empty environment (downloads are kept by pip)")
        shutil.rmtree(VENV)
    elif VENV.exists() and not usable():
        if not (VENV / "pyvenv.cfg").exists() and any(VENV.iterdir()):
            stop(f"{VENV} is not a virtual environment. Move it away, or name another folder with FINETUNE_LAB_VENV.")
        say(f"the Python in {VENV} does not start: making a new environment")
        shutil.rmtree(VENV)
    if not VENV.exists():
        create()
    BUSY.touch()
    STAMP.unlink(missing_ok=True)
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    if not sys.stdout.isatty():  # a log file needs no progress bars
        pip += ["-q", "--progress-bar", "off"]
    index = os.environ.get("FINETUNE_LAB_TORCH_INDEX")
    if index:
        say("taking torch from the index in FINETUNE_LAB_TORCH_INDEX")
        if run(*pip, "-c", "constraints.txt", "--index-url", index, "torch"):
            stop("torch could not be installed from FINETUNE_LAB_TORCH_INDEX. Check its value, then run this again.")
    elif platform.system() == "Linux" and not (
        shutil.which("nvidia-smi") or torch_is_there() or os.environ.get("PIP_NO_INDEX")  # a pack has its own torch
    ):
        say("No NVIDIA driver was found. If pip now fetches packages called nvidia-..., that is about 3 GB that")
        say("this machine cannot use: stop with Ctrl-C, set FINETUNE_LAB_TORCH_INDEX to the address that the CPU")
        say("selector on pytorch.org's install page shows after --index-url, and run the same command again.")
        if sys.stdin.isatty() and sys.stdout.isatty():
            time.sleep(8)
    offline = os.environ.get("PIP_NO_INDEX")
    size = "from files here" if offline else "about 500 MB of downloads the first time"
    say(f"installing the pinned packages ({size}; minutes, not seconds)")
    if run(*pip, "-c", "constraints.txt", "-e", ".[dev]"):
        stop("the install failed: the reason stands above. Downloads are kept; run the same command again.")
    STAMP.write_text(wanted())
    BUSY.unlink()
    say("installed")


def torch_is_there():
    return any(VENV.glob("lib/python*/site-packages/torch")) or (VENV / "Lib/site-packages/torch").exists()


# ---- lab ----------------------------------------------------------------------------------------------------------


def lab(arguments, ours):
    """Doctor, then JupyterLab on the first notebook; this process becomes JupyterLab where the system allows it.

    ours: the environment is the one made here, so JupyterLab's settings for it may be written.
    """
    if run(PYTHON, "-m", "finetune_lab", "doctor"):
        stop("something above must be fixed before the lessons can run; then run this again.")
    if ours:
        settings = VENV / "share" / "jupyter" / "lab" / "settings" / "overrides.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(JUPYTERLAB, indent=2))
    command = [str(PYTHON), "-m", "jupyterlab", "--log-level=WARN", f"--ServerApp.root_dir={ROOT}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        say("you are root (a container?): JupyterLab starts with --allow-root")
        command.append("--allow-root")
    if FIRST.exists():
        # As the default address and not as a file: then the address that is printed leads there too.
        command.append(f"--LabApp.default_url=/lab/tree/{FIRST.relative_to(ROOT).as_posix()}")
    say("starting JupyterLab; its address with the token follows. Stop it with Ctrl-C.")
    if ours:
        say("finetune-lab commands: in a terminal of JupyterLab, or in yours after " + activation())
    say("$ " + " ".join(["jupyter lab", *command[3:], *arguments]))
    os.chdir(ROOT)
    if os.name == "nt":
        sys.exit(subprocess.call(command + arguments, env=environment()))
    os.execve(command[0], command + arguments, environment())


def activation():
    folder = os.path.relpath(PYTHON.parent, ROOT) if PYTHON.is_relative_to(ROOT) else PYTHON.parent
    return str(Path(folder, "activate")) if os.name == "nt" else f". {folder}/activate"


# ---- test ---------------------------------------------------------------------------------------------------------


def stages():
    """Name -> command. In this order: what fails fastest comes first."""
    pytest = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider"]
    # *.mine-*: what `finetune-lab reset` keeps of the reader's.
    nbval = [*pytest, "--ignore-glob=*.mine-*", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=120"]
    return {
        "lint": [PYTHON, "-m", "ruff", "check", "."],
        "format": [PYTHON, "-m", "ruff", "format", "--check", "--output-format=concise", "."],
        "build": [PYTHON, "-m", "finetune_lab", "build", "--check"],
        "tests": [*pytest, "--durations=10", "-m", "not network", "tests"],
        "solutions": [*nbval, "solutions"],
        "notebooks": [*nbval, "notebooks"],
    }


def test(chosen, installed):
    """Run the stages, all of them even after a failure; print minutes and failures; return 0 or 1."""
    todo = {name: command for name, command in stages().items() if not chosen or name in chosen}
    with tempfile.TemporaryDirectory(prefix="finetune-lab-") as home:
        env = environment(
            FINETUNE_LAB_HOME=home,  # progress of the tests is not the learner's
            FINETUNE_LAB_MODEL="tiny",
            IPYTHONDIR=home,
            JUPYTER_CONFIG_DIR=home,
            JUPYTER_RUNTIME_DIR=home,
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1",
            PYTHONUNBUFFERED="1",
            # glibc: keep freed memory; 77,000 page faults a training step become 6,000.
            MALLOC_MMAP_THRESHOLD_="1073741824",
            MALLOC_TRIM_THRESHOLD_="2147483647",
        )
        modes = {"solutions": "solved", "notebooks": "unsolved"}
        envs = {name: {**env, "FINETUNE_LAB_CHECK": modes.get(name, "learn")} for name in todo}
        started = time.monotonic()
        ended = together(todo, envs)
        wall = time.monotonic() - started
    rows = [("install", installed, True), *((name, *ended[name]) for name in todo)]
    say("---- where the minutes went (stages run two at a time)")
    for name, seconds, good in [*rows, ("total", installed + wall, all(row[2] for row in rows))]:
        say(f"{name:<10} {seconds / 60:6.1f} min   {'ok' if good else 'FAILED'}")
    return 0 if all(row[2] for row in rows) else 1


def together(commands, envs):
    """Run the commands in their order, two at a time; what they print gets the stage's name before each line.

    A stage keeps about one core busy, so two cores do both. Returns name -> (seconds, did it end well?).
    """
    started, stopped = [], False

    def stage(name):
        words = [str(word) for word in commands[name]]
        say(f"---- {name}: $ " + " ".join([Path(words[0]).name, *words[1:]]))
        start = time.monotonic()
        process = subprocess.Popen(
            words, cwd=ROOT, env=envs[name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
            errors="replace",
        )  # fmt: skip
        started.append(process)
        if stopped:  # between the signal and this line
            process.kill()
        for line in process.stdout:
            print(f"{name:<9} | {line}", end="", flush=True)
        return time.monotonic() - start, process.wait() == 0

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        futures = {name: pool.submit(stage, name) for name in commands}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:  # Ctrl-C, kill: take pytest along
            stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.kill()
            raise


# ---- clean --------------------------------------------------------------------------------------------------------


def clean(everything):
    """Remove caches and build leftovers; never a notebook, a progress file or a model."""
    names = ("__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache", ".hypothesis", "*.egg-info")
    found = [ROOT / "build", ROOT / "dist"]
    for top in [ROOT, *(p for p in ROOT.iterdir() if p.is_dir() and p != VENV and p.name != ".git")]:
        for name in names:
            # *.egg-info belongs to the install in .venv: it goes only together with it.
            if name != "*.egg-info" or everything:
                found += top.glob(name) if top == ROOT else top.rglob(name)
    if everything:
        found.append(VENV)
    for path in found:
        if path.exists():
            say(f"removing {os.path.relpath(path, ROOT)}")
            shutil.rmtree(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tasks.py lab --no-browser",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--here", action="store_true", help="use the Python that runs this file; install nothing")
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    tasks.add_parser("lab", help="install, doctor, open JupyterLab; further words go to `jupyter lab`")
    one = tasks.add_parser("test", help="everything that CI checks, or the stages that you name")
    one.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(stages()))
    one = tasks.add_parser("install", help="make .venv what constraints.txt says")
    one.add_argument("--force", action="store_true", help="run pip even when nothing has changed")
    tasks.add_parser("build", help="make the notebooks from solutions/*.py; further words go to `finetune-lab build`")
    tasks.add_parser("doctor", help="what this machine can run")
    tasks.add_parser("format", help="let ruff put the code in order")
    one = tasks.add_parser("clean", help="remove caches")
    one.add_argument("--all", action="store_true", help="remove .venv too")
    args, rest = parser.parse_known_args()
    if rest and args.task not in ("lab", "build", "doctor"):
        parser.error(f"unknown: {' '.join(rest)}")
    unknown = set(getattr(args, "stages", [])) - set(stages())
    if unknown:
        parser.error(f"no such stage: {' '.join(sorted(unknown))}. The stages are {', '.join(stages())}.")

    if args.task == "clean":
        return clean(args.all)
    started = time.monotonic()
    if args.here:
        global PYTHON
        PYTHON = Path(sys.executable)
    else:
        install(force=getattr(args, "force", False))
    if args.task == "lab":
        return lab(rest, ours=not args.here)
    if args.task == "test":
        return test(args.stages, time.monotonic() - started)
    if args.task == "build":
        return run(PYTHON, "-m", "finetune_lab", "build", *rest)
    if args.task == "doctor":
        return run(PYTHON, "-m", "finetune_lab", "doctor", *rest)
    if args.task == "format":
        return run(PYTHON, "-m", "ruff", "check", "--fix", ".") + run(PYTHON, "-m", "ruff", "format", ".")
    return 0


if __name__ == "__main__":
    # Ended by `kill`: take pip or pytest along, so that nothing goes on writing into .venv behind the next install.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        stop("stopped. Run the same command again to go on.")
