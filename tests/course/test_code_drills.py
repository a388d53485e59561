"""Claims that hold for every code drill: what the hidden tests accept and what they refuse, and with which words."""

import importlib
import inspect
from pathlib import Path

import pytest
import yaml

from finetune_lab.course import checks
from finetune_lab.course.drills import code_tests, exercises

BANK = Path(code_tests.__file__).parent / "bank"
FILES = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(BANK.glob("*.yml"))]
ITEMS = [item for file in FILES for item in file if item["kind"] == "code"]
EXERCISES = exercises.REGISTRY
SEEDS = (0, 1, 2, 3)


def from_starter(item):
    namespace = {}
    exec(item["starter"], namespace)  # noqa: S102 (our own bank)
    return namespace[item["exercise"]]


def test_there_are_eight_drills_and_each_has_an_item():
    assert len(EXERCISES) >= 8
    assert sorted(item["exercise"] for item in ITEMS) == sorted(EXERCISES)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_reference_passes(name):
    for seed in SEEDS:
        assert checks.judge(EXERCISES[name], EXERCISES[name].reference, seed).status == "ok"


@pytest.mark.parametrize("name", EXERCISES)
def test_each_wrong_answer_fails_with_its_own_hint(name):
    ex = EXERCISES[name]
    assert len(ex.wrong) >= 3 and len({wrong.hint for wrong in ex.wrong}) == len(ex.wrong)
    for wrong in ex.wrong:
        for seed in SEEDS:
            verdict = checks.judge(ex, wrong.answer, seed)
            assert (verdict.status, verdict.text) == ("wrong", wrong.hint), f"{wrong.name}, seed {seed}"


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item["id"])
def test_the_starter_is_not_attempted_and_has_the_references_signature(item):
    module, name = item["reference"].split(":")
    reference = getattr(importlib.import_module(module), name)
    assert reference is EXERCISES[item["exercise"]].reference
    starter = from_starter(item)
    assert list(inspect.signature(starter).parameters) == list(inspect.signature(reference).parameters)
    assert starter.__doc__
    assert checks.judge(EXERCISES[item["exercise"]], starter, 0).status == "not attempted"


def test_drills_stay_out_of_the_lessons_registry():
    assert all(not ex.id.startswith("D.") for ex in checks.REGISTRY.values())
