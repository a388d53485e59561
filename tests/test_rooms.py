"""Dependencies point one way: course -> lab -> methods; `methods` imports torch and its own siblings only."""

import re
from pathlib import Path

import pytest

from finetune_lab.course.architecture import PACKAGE, imports, names, room, svg

# room -> rooms of the package that it may import; "" are the small modules at the top (errors, environment, cli)
ALLOWED = {"methods": {"methods"}, "lab": {"", "lab", "methods"}, "course": {"", "course", "lab", "methods"}}
MODULES = [path for room in ALLOWED for path in sorted((PACKAGE / room).rglob("*.py"))]


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


def test_the_picture_of_the_rooms_is_current():
    """The words in it, that is: every module, and what it imports; not the last digit of a line's place."""
    picture = Path(__file__).resolve().parents[1] / "docs" / "architecture.svg"
    now, kept = (re.findall(r"<text.*?>(.*?)</text>", text) for text in (svg(), picture.read_text(encoding="utf-8")))
    assert kept == now, "draw it again: python -m finetune_lab.course.architecture"


def test_the_picture_counts_a_folder_as_one_name_with_its_modules():
    listed = dict(names("lab"))
    modules = [path for path in (PACKAGE / "lab" / "merging").glob("*.py") if path.name != "__init__.py"]
    assert listed[f"merging ({len(modules)})"] == {"methods"}
    assert "models" in listed and "merging" not in listed
