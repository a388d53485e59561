"""A lesson from the template builds, is right, and lacks nothing but its length."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_lab import cli
from finetune_lab.course import new_lesson

ROOT = Path(__file__).resolve().parents[2]
NAME, TITLE = "90_from_the_template", "From the template"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, with lesson 00 only, and a new lesson in it."""
    clone = tmp_path_factory.mktemp("clone")
    skip = shutil.ignore_patterns("__pycache__", "*.tmp", "bank")
    shutil.copytree(ROOT / "finetune_lab", clone / "finetune_lab", ignore=skip)
    for folder, pattern in (("solutions", "00_*"), ("tests", "conftest.py"), ("tests/methods", "test_lora.py"), (".", "pyproject.toml"),
                            ("tests/lessons", "conftest.py"), ("tests/lessons", "test_all_exercises.py")):  # fmt: skip
        (clone / folder).mkdir(parents=True, exist_ok=True)
        for path in (ROOT / folder).glob(pattern):
            shutil.copy(path, clone / folder)
    assert cli.main(["new-lesson", NAME, TITLE, "--root", str(clone)]) == 0
    return clone


def run(clone, *words):
    """Python on the copy's own package; (exit code, what it said)."""
    environment = {**os.environ, "PYTHONPATH": str(clone), "FINETUNE_LAB_HOME": str(clone / "home")}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(clone):
    code, said = run(clone, "finetune_lab", "build", "90", "--execute")
    assert code == 0, said
    return clone


@pytest.mark.slow
def test_it_builds_and_both_notebooks_are_there(built):
    assert (built / "notebooks" / f"{NAME}.ipynb").exists() and (built / "solutions" / f"{NAME}.ipynb").exists()
    assert run(built, "finetune_lab", "build", "90", "--check")[0] == 0


@pytest.mark.slow
def test_only_its_length_breaks_a_rule(built):
    code, said = run(built, "finetune_lab", "lint", "90")
    assert re.findall(rf"{NAME}: \d+ (\w+), expected", said) == ["cells", "words", "exercises"], said
    assert code == 1 and said.count(f"{NAME}: ") == 3, said


@pytest.mark.slow
def test_its_own_tests_and_those_of_every_exercise_pass(built):
    words = ["pytest", "-q", "-p", "no:cacheprovider", "tests/lessons", "tests/methods/test_from_the_template.py"]
    code, said = run(
        built, *words, "-k", "(90 or from_the_template) and not budgets", "--deselect=tests/methods/test_lora.py"
    )
    assert code == 0, said
    assert int(re.search(r"(\d+) passed", said)[1]) >= 9


def test_what_it_writes_is_in_order(clone):
    files = [new_lesson.fill(place, NAME, TITLE) for place in new_lesson.FILES.values()]
    for words in (["check"], ["format", "--check"]):
        code, said = run(clone, "ruff", *words, "--no-cache", *files)
        assert code == 0, said


def test_nothing_of_the_template_is_left_but_what_is_to_do(clone):
    for place in new_lesson.FILES.values():
        text = (clone / new_lesson.fill(place, NAME, TITLE)).read_text()
        assert not re.search(r"@[A-Z]+@", text)
    assert "TODO" in (clone / "solutions" / f"{NAME}.py").read_text()


@pytest.mark.parametrize(
    "name, title, says",
    [
        ("lora", "LoRA", "is no name for a lesson"),
        ("8_lora", "LoRA", "is no name for a lesson"),
        ("91_lora", "LoRA: more", "the title"),
        ("90_other", "Other", "90_from_the_template.py and finetune_lab/course/exercises/l90.py exist already"),
        ("91_lora", "LoRA", "tests/methods/test_lora.py exist already"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(name, title, says, clone, capsys):
    before = sorted(clone.rglob("*.py"))
    assert cli.main(["new-lesson", name, title, "--root", str(clone)]) == 2
    assert says in capsys.readouterr().err
    assert sorted(clone.rglob("*.py")) == before


def test_a_folder_that_is_no_clone_is_refused(tmp_path, capsys):
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "00_start.py").write_text("")
    assert cli.main(["new-lesson", "90_new", "New", "--root", str(tmp_path)]) == 2
    assert "clone of the repository" in capsys.readouterr().err
