"""`finetune-lab doctor`: what this machine can run, and for each problem how to fix it.

Reads the versions from the installed packages, the ranges from this package's own requirements, the exact pins from
constraints.txt when the course lies in its repository, and tries torch and the tiny model in a process of its own
(probe.py). It uses nothing but the standard library itself, so that it works when everything else is broken.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune_lab.course import probe, versions

EVIDENCE = Path(__file__).resolve().parents[1] / "evidence"
REINSTALL = "run `make install` (or `python tasks.py install`) in the repository"
OLDEST = (3, 11)
MARKS = {"ok": "[ok]", "note": "[i] ", "problem": "[!] ", "blocked": "[x] "}
EXAMPLES = """examples:
  finetune-lab doctor
  finetune-lab doctor --json
  finetune-lab doctor --class anna      (in a workshop: one file for the instructor)

exit code: 0 the lessons run on the tiny model, 1 something blocks them"""


@dataclass
class Row:
    """One finding. level: `ok`, `note` (good to know), `problem` (lessons still run) or `blocked`."""

    name: str
    value: str
    level: str = "ok"
    fix: str = ""


# ---- packages -----------------------------------------------------------------------------------------------------


def check_packages() -> tuple[list[Row], dict[str, str | None]]:
    """One row when all is well, else one for each package that is not; and every version."""
    lines, pinned, rows, found = versions.requirements(), versions.pins(), [], {}
    exact = 0
    for line in lines:
        name, wanted, developer = versions.parse(line)
        have, pin = versions.version_of(name), pinned.get(versions.normal(name))
        found[name] = have
        if have is None and developer:
            rows.append(Row(name, "not installed; only `make test` needs it", "note", REINSTALL))
        elif have is None:
            rows.append(Row(name, f"not installed, needed: {wanted}", "blocked", REINSTALL))
        elif not versions.in_range(have, wanted):
            rows.append(Row(name, f"{have}, needed: {wanted}", "problem", REINSTALL))
        elif pin and have != pin:
            rows.append(Row(name, f"{have}; tested with {pin}", "note", f"{REINSTALL} for the tested version"))
        else:
            exact += 1
    if not lines:
        rows.append(Row("packages", "finetune-lab is not installed in this Python", "blocked", REINSTALL))
    else:
        what = "at the version of constraints.txt" if pinned else "in the range that finetune-lab asks for"
        rows.insert(0, Row("packages", f"{exact} of {len(lines)} {what}"))
    return rows, found


# ---- machine ------------------------------------------------------------------------------------------------------


def memory() -> tuple[int | None, int | None]:
    """(bytes in the machine, bytes free for programs); None where it cannot be told."""
    try:
        import psutil
    except ImportError:
        return None, None
    now = psutil.virtual_memory()
    return now.total, now.available


def gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def check_machine() -> list[Row]:
    """Python, cores, memory, disk, folders, kernel."""
    rows = [Row("Python", f"{platform.python_version()} in {sys.prefix}")]
    if sys.version_info < OLDEST:
        rows[0].level, rows[0].fix = "blocked", "the course needs Python 3.11 or newer: `make lab PYTHON=python3.11`"
    rows.append(Row("system", f"{platform.system()} {platform.release()}, {platform.machine()}"))
    rows.append(Row("cores", str(os.cpu_count() or "unknown")))
    total, free = memory()
    if total is None:
        rows.append(Row("memory", "unknown: the package psutil is not installed", "note", REINSTALL))
    else:
        rows.append(Row("memory", f"{gb(total)}, {gb(free)} free"))
        if free < 2e9:
            rows[-1].level, rows[-1].fix = "problem", "close other programs: a notebook wants about 2 GB"
    home = Path(os.environ.get("FINETUNE_LAB_HOME") or Path.home())
    while not home.exists():
        home = home.parent
    disk = shutil.disk_usage(home).free
    rows.append(Row("disk", f"{gb(disk)} free in {home}"))
    if disk < 1e9:
        rows[-1].level, rows[-1].fix = "problem", "make room, or set FINETUNE_LAB_HOME to a folder on a larger disk"
    return rows + [check_progress(), check_kernel()]


def check_progress() -> Row:
    """Can the learner's progress be written?"""
    try:
        from finetune_lab.course import progress

        folder = progress.home()
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".doctor-{os.getpid()}"
        trial.touch()
        trial.unlink()
    except ImportError as error:
        return Row("progress", f"unknown: {error}", "note", REINSTALL)
    except OSError as error:
        fix = "set FINETUNE_LAB_HOME to a folder that you may write"
        return Row("progress", f"cannot be written: {error}", "problem", fix)
    return Row("progress", str(folder))


def check_kernel() -> Row:
    """Do notebooks run in this Python? A kernel of another one is the most common reason for a missing package."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError as error:
        return Row("kernel", f"unknown: {error}", "blocked", REINSTALL)
    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel as error:
        return Row("kernel", f"Jupyter finds no kernel: {error}", "blocked", REINSTALL)
    found = shutil.which(command) or command
    # Jupyter itself replaces a bare `python` by the Python that it runs in.
    if command in ("python", "python3") or os.path.abspath(found) == os.path.abspath(sys.executable):
        return Row("kernel", "notebooks run in this Python")
    fix = f"{Path(sys.executable).name} -m ipykernel install --sys-prefix, or start Jupyter with `make lab`"
    return Row("kernel", f"notebooks would run in another Python: {command}", "problem", fix)


# ---- what was tried -----------------------------------------------------------------------------------------------


def check_probe(learnt: dict) -> list[Row]:
    """torch, the GPU and the tiny model, from what probe.run() learnt."""
    rows, card = [], learnt.get("gpu")
    torch = learnt.get("torch")
    if torch:
        rows.append(Row("torch", f"{torch['version']} starts"))
        if card:
            size = f", {gb(card['memory_bytes'])}" if card["memory_bytes"] else ""
            rows.append(Row("GPU", f"{card['name']}{size}, bf16: {'yes' if card['bf16'] else 'no'}"))
        else:
            rows.append(Row("GPU", "none: the tiny model needs none, a small real model runs on the CPU", "note"))
            if torch["cuda"] is None and shutil.which("nvidia-smi"):
                rows[-1].value = "this machine has an NVIDIA driver, but torch is the CPU build"
                rows[-1].fix = "docs/places.md, CPU-only and CUDA, tells how to get the CUDA build"
    if problem := learnt.get("setting", {}).get("problem"):
        name = learnt["setting"]["name"]
        value = f"FINETUNE_LAB_MODEL={name}: {problem}"
        rows.append(
            Row("model setting", value, "blocked", f"unset it for the tiny model, or set one of {known(learnt)}")
        )
    if learnt.get("failed"):
        step, reason = learnt["failed"], learnt["reason"]
        if step == "tiny":
            rows.append(Row("tiny model", f"does not run: {reason}", "blocked", f"{REINSTALL}, or report this line"))
        else:
            name = "torch" if step == "torch" else "transformers"
            fix = f"{REINSTALL} with ARGS=--force (or `python tasks.py install --force`)"
            if "DLL" in reason:
                fix = "install the Microsoft Visual C++ Redistributable, then try again"
            rows.append(Row(name, f"does not start: {reason}", "blocked", fix))
    if learnt.get("tiny"):
        tiny = learnt["tiny"]
        peak = f", {gb(tiny['peak_bytes'])} of memory at most" if tiny["peak_bytes"] else ""
        value = f"loaded in {tiny['load_s']:.1f} s, writes {tiny['tokens_per_s']:.0f} tokens/s one by one{peak}"
        rows.append(Row("tiny model", value))
    if "avx512_bf16" in cpu_flags():
        value = 'bitsandbytes may say "Failed to load CPU gemm_4bit_forward" on this CPU; harmless, the course hides it'
        rows.append(Row("bitsandbytes", value, "note"))
    return rows


def known(learnt: dict) -> str:
    return ", ".join(row["name"] for row in learnt.get("models", []))


def cpu_flags() -> set[str]:
    """The processor's features as Linux names them; empty elsewhere."""
    try:
        return set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    except (OSError, TypeError):
        return set()


def tiers(learnt: dict) -> list[dict]:
    """What the lessons can run on here: `{tier, runs, why, recorded}`, the last from `recorded_run`."""
    models = {row["name"]: row for row in learnt.get("models", [])}
    _, free = memory()
    rows = [{"tier": "tiny", "runs": "tiny" in learnt, "why": "" if "tiny" in learnt else "see above"}]
    real = models.get("smollm2-135m")
    if real:
        why = "on this machine" if real["cached"] else "fetch it once: finetune-lab models fetch smollm2-135m"
        enough = free is None or free > 3e9
        rows.append({"tier": "smollm2-135m", "runs": enough, "why": why if enough else "less than 3 GB memory free"})
    card = learnt.get("gpu")
    why = "any hub model that fits: finetune-lab run 01 --model NAME" if card else "no GPU"
    rows.append({"tier": "hub models on a GPU", "runs": bool(card), "why": why})
    return [row | {"recorded": recorded_run(row["tier"])} for row in rows]


def recorded_run(model: str) -> dict | None:
    """`{cpu, cores, seconds: {lesson: seconds}}` of the run that finetune_lab/evidence/run_*.json keeps of a model.

    Such a file is what `finetune-lab run --json` prints, day, machine and versions included. The machine is the one
    that recorded it, not this one. None when no run was kept.
    """
    for path in sorted(EVIDENCE.glob("run_*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["model"] == model:
            seconds = {row["lesson"][:2]: row["seconds"] for row in kept["rows"] if not row["failures"]}
            return {"cpu": kept["machine"]["cpu"], "cores": kept["machine"]["cores"], "seconds": seconds}
    return None


def _took(run: dict | None) -> str:
    if not run or not run["seconds"]:
        return "no run of the lessons is recorded"
    first, last = (
        f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        for seconds in (min(run["seconds"].values()), max(run["seconds"].values()))
    )
    span = first if first == last else f"{first} to {last}"
    return f"lessons took {span} (recorded on {run['cores']} cores, {run['cpu']})"


# ---- command ------------------------------------------------------------------------------------------------------


def examine() -> dict:
    """Everything as one dictionary: `ok`, `rows`, `tiers`, `versions`."""
    packages, found = check_packages()
    rows = check_machine() + packages
    learnt = probe.run()
    rows += check_probe(learnt)
    ready = not any(row.level == "blocked" for row in rows) and "tiny" in learnt
    return {"ok": ready, "rows": [asdict(row) for row in rows], "tiers": tiers(learnt), "versions": found}


def show(report: dict) -> None:
    """Print the findings, each problem with its fix, then the tiers."""
    for row in report["rows"]:
        start = f"{MARKS[row['level']]} {row['name']:<14}"
        print(textwrap.fill(row["value"], 116, initial_indent=start, subsequent_indent=" " * len(start)))
        if row["fix"] and row["level"] != "ok":
            print(textwrap.fill(row["fix"], 116, initial_indent=" " * 19 + "fix: ", subsequent_indent=" " * 24))
    print("\nThe lessons run here on:")
    for tier in report["tiers"]:
        words = "; ".join(part for part in (tier["why"], _took(tier["recorded"]) if tier["runs"] else "") if part)
        start = f"{'[ok]' if tier['runs'] else '[ ] '} {tier['tier']:<22}"
        print(textwrap.fill(words, 116, initial_indent=start, subsequent_indent=" " * len(start)))
    print("\nReady: open notebooks/00_start_here.ipynb." if report["ok"] else "\nNot ready: see the lines with [x].")


def doctor(args) -> int:
    if args.name is not None:
        from finetune_lab.course import classroom

        classroom.file_name(args.name)  # a name that cannot be used is told before the work
    report = examine()
    if args.json and args.name is not None:
        print(json.dumps(classroom.record(args.name, report)))
    elif args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
        if args.name is not None:
            print(f"\n{classroom.write(args.name, report)} is written. {classroom.SAID}")
    return 0 if report["ok"] else 1


def register(subparsers) -> None:
    """Add the command `doctor` to the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    line = "what this machine can run, and how to fix what it cannot"
    parser = subparsers.add_parser("doctor", help=line, description=line, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--json", action="store_true", help="the same as JSON, with every version")
    parser.add_argument("--class", dest="name", metavar="NAME", help="also write class-NAME.json for the instructor "
                        "(with --json: print it); NAME is yours to choose, without spaces")  # fmt: skip
    parser.set_defaults(func=doctor)
