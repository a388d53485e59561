"""Where lessons live, how they are named, and how a file is written so that nothing is ever half there.

A course folder holds `solutions/NN_name.py` (the only file a person edits), `solutions/NN_name.ipynb` and
`notebooks/NN_name.ipynb` (both made by `finetune-lab build`).
"""

import itertools
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from finetune_lab.errors import UserError

_NAME = re.compile(r"(\d\d)_[a-z0-9_]+")


@dataclass(frozen=True)
class Lesson:
    """One lesson of the course folder `root`. `name` is e.g. `01_loss_masking`, `number` is `01`."""

    root: Path
    name: str

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def source(self) -> Path:
        return self.root / "solutions" / f"{self.name}.py"

    @property
    def solution(self) -> Path:
        return self.root / "solutions" / f"{self.name}.ipynb"

    @property
    def notebook(self) -> Path:
        return self.root / "notebooks" / f"{self.name}.ipynb"


def course_root(given: str | os.PathLike | None = None) -> Path:
    """The course folder: `given`, else the nearest folder upwards with `solutions/`, else the one beside the package.

    Raises:
        UserError: the folder that was given, or every place that was tried, has no `solutions/`.
    """
    if given is not None:
        tried = [Path(given).resolve()]
    else:
        here = Path.cwd()
        tried = [here, *here.parents, Path(__file__).resolve().parents[2]]
    for folder in tried:
        if any(_NAME.fullmatch(path.stem) for path in (folder / "solutions").glob("*.py")):
            return folder
    raise UserError(
        f"no lessons in {tried[0]}: expected a folder that has solutions/NN_name.py in it. "
        "Go to the folder of the course, or name it with --root."
    )


def lessons(root: Path) -> list[Lesson]:
    """Every lesson of the course folder, by number."""
    found = sorted(p.stem for p in (root / "solutions").glob("*.py") if _NAME.fullmatch(p.stem))
    for first, second in itertools.pairwise(found):
        if first[:2] == second[:2]:
            raise UserError(f"two lessons have the number {first[:2]}: {first} and {second}. Rename one of them.")
    return [Lesson(root, name) for name in found]


def select(root: Path, wanted: Iterable[str]) -> list[Lesson]:
    """The lessons that a person named (`1`, `01`, `01_loss_masking` or a path to one); all when none is named.

    Raises:
        UserError: a name fits no lesson.
    """
    every = lessons(root)
    chosen = []
    for word in wanted:
        stem = Path(word).stem
        number = stem.zfill(2) if stem.isdigit() else None
        hits = [lesson for lesson in every if lesson.name == stem or lesson.number == number]
        if not hits:
            raise UserError(f"there is no lesson {word!r}. The lessons are: {', '.join(x.name for x in every)}.")
        chosen += [hit for hit in hits if hit not in chosen]
    return chosen or every


def write_atomic(path: Path, text: str) -> None:
    """Write all of `text` or nothing: into a temporary file beside `path`, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_mine(path: Path) -> Path:
    """Copy `path` to `<name>.mine-YYYYMMDD-HHMMSS<suffix>` beside it and return the copy's path.

    The name is taken with exclusive creation, so that a copy never replaces an older one, not even one of the same
    second (the next gets `-2`).
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        extra = "" if attempt == 1 else f"-{attempt}"
        copy = path.with_name(f"{path.stem}.mine-{stamp}{extra}{path.suffix}")
        try:
            with open(path, "rb") as source, open(copy, "xb") as target:  # no empty copy of what cannot be read
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
            return copy
        except FileExistsError:
            continue
    raise UserError(f"could not find a free name for a copy of {path}; move old *.mine-* files away.")
