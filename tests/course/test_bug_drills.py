"""Claims that hold for every bug drill: the snippet trains and is caught, the repair passes, wrong repairs are caught."""

import time

import pytest

from finetune_lab.course.drills import detectors, judge, schema

BUGS = [item for item in schema.load() if isinstance(item, schema.Bug)]


def verdict(item, code):
    namespace = {"__name__": "snippet"}
    exec(compile(code, item.id, "exec"), namespace)  # noqa: S102 (our own bank)
    return getattr(detectors, item.detector)(namespace)


def test_there_are_at_least_twelve_bugs():
    assert len(BUGS) >= 12


@pytest.mark.parametrize("item", BUGS, ids=lambda item: item.id)
def test_the_shipped_snippet_trains_and_is_caught(item):
    found = verdict(item, item.snippet)
    assert found and not found.startswith(detectors.IDLE) and not found.startswith("it raises"), found


@pytest.mark.parametrize("item", BUGS, ids=lambda item: item.id)
def test_the_repair_passes_in_less_than_a_second(item):
    verdict(item, item.snippet)  # imports and torch's first calls are not the detector's time
    start = time.perf_counter()
    assert verdict(item, judge.repaired(item, item.line, item.fix)) is None
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("item", "wrong"),
    [(item, wrong) for item in BUGS for wrong in item.wrong_fixes],
    ids=lambda value: getattr(value, "id", ""),
)
def test_each_wrong_repair_is_caught(item, wrong):
    assert verdict(item, judge.repaired(item, item.line, wrong.line_text)) is not None


def test_a_repair_at_another_line_that_works_is_right():
    item = next(item for item in BUGS if item.id == "bug-lora-both-zero")
    other = item.snippet.replace("torch.zeros(base.out_features, rank)", "torch.randn(base.out_features, rank)")
    assert verdict(item, other) is None  # B random and A zero is the identity too


def test_an_error_of_the_snippet_becomes_a_sentence():
    item = next(item for item in BUGS if item.id == "bug-prompt-counted")
    found = verdict(item, judge.repaired(item, item.line, "labels = answer[None, :1]"))
    assert found.startswith("it raises ")
