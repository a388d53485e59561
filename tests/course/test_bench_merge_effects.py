"""The bench of lesson 07 compares what it says it compares."""

import math

import pytest

from finetune_lab.course import merge_specialists as specialists
from finetune_lab.course.bench import merge_effects as effects
from finetune_lab.course.merge_paired import PAIRS, differences, title
from finetune_lab.lab import train


@pytest.fixture(scope="module", autouse=True)
def short():
    """A few steps of each skill."""
    steps, specialists.STEPS = specialists.STEPS, {"extract": 2, "answer": 3, "math": 2}
    for cached in (effects.specialist, effects.joint):
        cached.cache_clear()
    yield
    specialists.STEPS = steps
    for cached in (effects.specialist, effects.joint):
        cached.cache_clear()


def test_joint_training_takes_as_many_items_and_steps_as_the_specialists(monkeypatch):
    seen = {}

    def taken(kind, items, steps, lr, seed):
        seen[kind] = len(items), steps
        return {}, {}

    monkeypatch.setattr(specialists, "train_one", taken)
    effects.joint.__wrapped__(0)
    assert seen["full"] == (16 * 7, 7)


def test_joint_training_sees_the_very_items_of_the_specialists(monkeypatch):
    kept = []
    monkeypatch.setattr(specialists, "train_one", lambda kind, items, *rest: (kept.extend(items), {}))
    effects.joint.__wrapped__(3)
    for skill, steps in specialists.STEPS.items():
        rows = specialists.tasks.load_task(skill, "train", specialists.TINY.recipes[skill].items, 3)
        wanted = [rows[i] for batch in train.batches(len(rows), 16, steps, 3) for i in batch]
        assert all(item in kept for item in wanted)


def test_scales_are_chosen_on_validation_items_and_told_on_test_items(monkeypatch):
    """The scale that is best on validation stands in the row, with the test score of that scale."""

    def score(weights, seed, n, split="test", skills=effects.SKILLS):
        lam = weights["x"]
        good = {"validation": lam == 0.7, "test": lam == 1.0}[split]
        return {skill: float(good) for skill in effects.SKILLS} | {"loss": 0.0}

    monkeypatch.setattr(effects, "score", score)
    monkeypatch.setattr(effects, "stories", lambda *_: 2.0)
    monkeypatch.setattr(effects, "base", lambda: (None, None, {"x": 0.0}))
    monkeypatch.setattr(effects, "onto_base", lambda *_: {"x": 1.0})
    found = effects.swept([], 0, 4, (0.5, 0.7, 1.0))
    assert found["TIES 0.2 chosen"]["lam"] == 0.7 and found["TIES 0.2 chosen"]["extract"] == 0.0
    assert found["TIES 0.2 lam=1"]["extract"] == 1.0


def test_a_lora_specialist_is_its_base_plus_its_adapters():
    weights, adapters = effects.specialist("LoRA", "answer", 0)
    origin = effects.base()[2]
    path = next(iter(adapters))
    moved = weights[f"{path}.weight"] - origin[f"{path}.weight"]
    update = effects.merging.update(adapters[path])
    assert (moved - update).abs().max() < 1e-5
    assert len(adapters) == 35


def test_both_ends_of_the_line_to_the_twin_are_one_function():
    found = effects.lines(0, 4, 1.0, (0, 1))
    assert all(math.isfinite(value) for scores in found.values() for value in scores.values())
    one, other = (found[f"answer to its permuted twin, t={t}"]["loss"] for t in (0, 1))
    assert one == pytest.approx(other, rel=1e-3)


def test_subtracting_nothing_leaves_the_joint_model():
    found = effects.subtraction(0, 4, 1.0, (0,))["joint - 0 math"]
    assert found["loss"] == pytest.approx(effects.score(effects.joint(0), 0, 4)["loss"])


def test_differences_are_taken_seed_by_seed():
    """A way that is better by the same amount in every seed is apart, however far the seeds lie from each other."""
    one, other, measure = PAIRS[0]
    runs = [{one: {measure: 0.1 * seed + 0.02}, other: {measure: 0.1 * seed}} for seed in range(5)]
    (gap, half), *rest = differences(runs).values()
    assert gap == pytest.approx(0.02) and half == pytest.approx(0, abs=1e-12) and not rest


def test_the_interval_is_students():
    one, other, measure = PAIRS[0]
    runs = [{one: {measure: value}, other: {measure: 0.0}} for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert differences(runs)[title(one, other, measure)] == pytest.approx((3.0, 1.963), abs=1e-3)
