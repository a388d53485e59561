"""Which version of each package is installed, which range this package asks for, and which version is pinned.

Standard library only, so that `finetune-lab doctor` can use it when an install is broken. Ranges hold numbers only
(`>=1.2,<2`), which is all that pyproject.toml uses; pip itself uses `packaging`.
"""

import re
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def requirements() -> list[str]:
    """The requirement lines of this package: as installed, else from pyproject.toml. Extras keep their marker."""
    try:
        return metadata.requires("finetune-lab") or []
    except metadata.PackageNotFoundError:
        path = ROOT / "pyproject.toml"
        return tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"] if path.exists() else []


def pins(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """name -> version from the lock file; empty when the course is installed without its repository."""
    if not path.exists():
        return {}
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {normal(name): version for name, version in found}


def parse(line: str) -> tuple[str, str, bool]:
    """`trl>=1.16,<1.17 ; extra == "dev"` -> ("trl", ">=1.16,<1.17", True); the last says: only with an extra."""
    need, _, marker = line.partition(";")
    name = re.match(r"[A-Za-z0-9._-]+", need.strip())[0]
    return name, need.strip()[len(name) :].strip(), "extra" in marker


def normal(name: str) -> str:
    """The form in which package names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version_of(name: str) -> str | None:
    """The installed version without the local part (`2.13.0` for `2.13.0+cpu`), or None."""
    try:
        return (metadata.version(name) or "").split("+")[0] or None
    except metadata.PackageNotFoundError:
        return None


def in_range(version: str, wanted: str) -> bool:
    """Is `version` inside `>=1.2,<2`? Numbers only, which is all that pyproject.toml uses."""

    def numbers(text):
        parts = [int(n) for n in re.findall(r"\d+", text)]
        return (parts + [0, 0, 0, 0])[:4]

    for sign, bound in re.findall(r"(>=|<=|==|<|>)\s*([\d.]+)", wanted):
        a, b = numbers(version), numbers(bound)
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b}[sign]:
            return False
    return True
