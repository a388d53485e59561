"""Claims that hold for every exercise of the course, and so for every one that is added."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from finetune_lab.course import build, check, checks, lint
from finetune_lab.course.lessons import lessons
from finetune_lab.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EXERCISES = list(check.load_all().values())
SEEDS = (0, 1, 2, 3)
ids = [ex.id for ex in EXERCISES]


def stub_of(ex):
    """What the learner's notebook holds before anybody wrote anything."""
    if ex.kind == "value":
        return ...

    def stub(*args, **kwargs):
        raise NotImplementedError

    return type("Stub", (), {"__init__": stub}) if ex.kind == "class" else stub


def definition(code: str, name: str) -> str | None:
    """The syntax tree of the function or class `name` in `code`; docstrings and types of signatures left out."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            for part in ast.walk(node):
                if isinstance(part, ast.arg):
                    part.annotation = None
                if isinstance(part, ast.FunctionDef):
                    part.returns = None
                if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
                    part.body = part.body[1:]
            return ast.dump(node)
    return None


@pytest.mark.parametrize("ex", EXERCISES, ids=ids)
def test_the_reference_passes_and_leaves_its_inputs_alone(ex):
    for seed in SEEDS:
        cases = ex.cases(checks.Draw(seed))
        assert not any(checks.outcome(ex, ex.reference, one, seed).changed for one in cases)
        verdict = checks.judge(ex, ex.reference, seed)
        assert verdict.status == "ok" and verdict.answer is ex.reference, verdict.text


@pytest.mark.parametrize("ex", EXERCISES, ids=ids)
def test_the_stub_is_not_attempted_and_the_reference_goes_on(ex):
    verdict = checks.judge(ex, stub_of(ex), 0)
    assert verdict.status == "not attempted" and verdict.answer is ex.reference


@pytest.mark.parametrize("ex", EXERCISES, ids=ids)
def test_there_are_three_typical_mistakes_with_different_hints(ex):
    assert len(ex.wrong) >= 3
    assert len({wrong.hint for wrong in ex.wrong}) == len(ex.wrong)


@pytest.mark.parametrize("ex", EXERCISES, ids=ids)
def test_each_known_wrong_answer_fails_with_its_own_hint(ex):
    for wrong in ex.wrong:
        for seed in SEEDS:
            verdict = checks.judge(ex, wrong.answer, seed)
            assert (verdict.status, verdict.text) == ("wrong", wrong.hint), f"{wrong.name}, seed {seed}"


@pytest.mark.parametrize("lesson", lessons(ROOT), ids=lambda lesson: lesson.number)
def test_exercises_are_called_in_their_lesson_and_calls_are_defined(lesson):
    called = re.findall(r"\bcheck\.(\w+)\(", build.read_source(lesson))
    defined = [ex.name for ex in EXERCISES if ex.id.startswith(lesson.number + ".")]
    assert sorted(set(called)) == sorted(defined)
    assert len(called) == len(set(called))


@pytest.mark.parametrize(
    "ex", [ex for ex in EXERCISES if ex.kind != "value"], ids=[ex.id for ex in EXERCISES if ex.kind != "value"]
)
def test_the_solution_is_the_packages_own_code(ex):
    """Code has one home: lesson and package may differ in docstrings and in the types of signatures, in nothing else."""

    def differ(a: str, b: str) -> bool:
        return definition(a, "f") != definition(b, "f")

    assert not differ("def f(x: int) -> int:\n    'doc'\n    return x", "def f(x):\n    return x  # why")
    assert differ("def f(x):\n    return x", "def f(x):\n    return +x") and differ(
        "def f(x=1): pass", "def f(x=2): pass"
    )

    lesson = next((x for x in lessons(ROOT) if ex.id.startswith(x.number + ".")), None)
    assert lesson, f"exercise {ex.id} belongs to no lesson"
    in_lesson = definition(build.read_source(lesson), ex.reference.__name__)
    in_package = definition(
        Path(inspect.getsourcefile(ex.reference)).read_text(encoding="utf-8"), ex.reference.__name__
    )
    assert in_lesson is not None, f"{lesson.source.name} does not define {ex.reference.__name__}"
    assert in_lesson == in_package


@pytest.mark.parametrize("lesson", lessons(ROOT), ids=lambda lesson: lesson.number)
def test_generated_notebooks_are_up_to_date(lesson):
    try:
        assert build.problems(lesson) == []
    except UserError as error:
        pytest.fail(str(error))


@pytest.mark.parametrize("lesson", lessons(ROOT), ids=lambda lesson: lesson.number)
def test_the_lesson_keeps_its_budgets(lesson):
    assert lint.problems(lesson) == []
