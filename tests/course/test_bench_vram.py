"""The bench of the estimator: its configurations, its goals, a small real run."""

import pytest

from finetune_lab.course.bench import holds, recorded, vram
from finetune_lab.lab.real_steps import truth
from finetune_lab.methods.memory import from_config


def test_at_least_sixty_configurations_and_every_dial():
    cells = vram.configurations()
    assert len({vram.name_of(*cell) for cell in cells}) == len(cells) >= 60
    assert {recipe.method for _, recipe in cells} >= {"full", "lora", "dora", "qlora"}
    assert {recipe.attention for _, recipe in cells} == {"sdpa", "eager"}
    assert {recipe.checkpointing for _, recipe in cells} == {True, False}
    assert len({family for family, _ in cells}) >= 6


@pytest.mark.parametrize(("a", "b", "expected"), [(2, 1, 2), (1, 2, 2), (0, 0, 1), (0, 1, float("inf"))])
def test_the_ratio_sees_both_directions(a, b, expected):
    assert vram.apart(a, b) == expected


@pytest.mark.parametrize("estimate", [997, 1003])
def test_too_little_misses_the_goal_as_well_as_too_much(estimate):
    assert not holds({"goal": "<= 1.001", "value": estimate, "ratio": vram.apart(estimate, 1000)})


def test_one_cell_is_exact():
    family, recipe = vram.configurations()[3]
    config = vram.SIZES | vram.FAMILIES[family]
    true, mine = truth(config, recipe), vram.estimated(from_config(config), recipe)
    assert mine["peak"] == true["peak"]


def test_every_goal_of_the_recorded_run_holds():
    rows = recorded("vram")["rows"]
    assert sum(row["goal"] is not None for row in rows) > 80
    assert all(holds(row) for row in rows if row["goal"] is not None)
