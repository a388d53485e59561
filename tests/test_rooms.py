"""Dependencies point one way: course -> lab -> methods; `methods` imports torch and its own siblings only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "finetune_lab"
# room -> rooms of the package that it may import; "" are the small modules at the top (errors, environment, cli)
ALLOWED = {"methods": {"methods"}, "lab": {"", "lab", "methods"}, "course": {"", "course", "lab", "methods"}}
MODULES = [path for room in ALLOWED for path in sorted((PACKAGE / room).rglob("*.py"))]


def imports(path: Path, source: str | None = None) -> set[str]:
    """The modules of this package that a file imports, anywhere in it; relative imports are resolved."""
    found = set()
    package = ["finetune_lab", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(source if source is not None else path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module or "") if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == "finetune_lab"}
    return found


def room(module: str) -> str:
    """`finetune_lab.lab.models` -> `lab`; a module at the top -> ``."""
    name = (module.split(".") + [""])[1]
    return name if name in ALLOWED else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0]
    wrong = {name for name in imports(path) if room(name) not in ALLOWED[own]}
    assert not wrong, f"{own} must not import {sorted(wrong)}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from finetune_lab.lab import models", "lab"),
        ("import finetune_lab.course.checks", "course"),
        ("def f():\n    from ..course import checks", "course"),
        ("from finetune_lab.errors import UserError", ""),
    ],
)
def test_the_rule_sees_every_way_to_import(source, found):
    names = imports(PACKAGE / "methods" / "chat.py", source)
    assert {room(name) for name in names} == {found}
