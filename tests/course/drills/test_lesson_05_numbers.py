"""The figures behind the number drills of lesson 05, worked out by hand."""

import math

import pytest

from finetune_lab.course.drills import numbers, schema

ITEMS = {item.id: item for item in schema.load() if item.file == "lesson_05.yml"}
# id -> drawn values, the answer by hand
BY_HAND = {
    "number-cosine-share": ({"at": {"step": 95, "steps": 189, "warmup": 6}}, (1 + math.cos(math.pi * 89 / 183)) / 2),
    "number-needed-length": ({"lengths": [120, 80, 300, 95, 110, 90, 1400, 105, 130, 100], "share": 0.9}, 300),
}


@pytest.mark.parametrize("id", BY_HAND)
def test_a_number_drill_gives_the_figure_worked_out_by_hand(id):
    values, expected = BY_HAND[id]
    assert numbers.evaluate(ITEMS[id], values) == pytest.approx(expected, rel=1e-6)


def test_every_number_drill_has_such_a_figure():
    assert {id for id, item in ITEMS.items() if item.kind == "number"} == set(BY_HAND)


def test_lesson_05_has_at_least_fifteen_drills():
    assert sum(item.lesson == "05" for item in schema.load()) >= 15
