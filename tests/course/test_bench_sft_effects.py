"""The bench of lesson 05 compares what it says it compares, and loses nothing when it is killed."""

import math
from dataclasses import replace

import pytest

from finetune_lab.course.bench import recorded
from finetune_lab.course.bench import sft_effects as effects
from finetune_lab.course.bench.sft_effects import FULL, LORA, SETTINGS, items_of, one_run


def test_every_setting_has_its_own_name_and_none_is_measured_twice():
    assert len({setting.label for setting in SETTINGS}) == len(set(SETTINGS)) == len(SETTINGS)


def test_every_setting_but_those_of_rate_changes_one_thing_of_a_setting_that_is_measured():
    for setting in SETTINGS:
        bases = [b for b in SETTINGS if (b.method, b.lr) == (setting.method, setting.lr)]
        assert any(sum(a != b for a, b in zip(vars(setting).values(), vars(base).values(), strict=True)) <= 1
                   for base in bases if base.label == f"{base.method} lr={base.lr:g}")  # fmt: skip


def test_held_out_items_are_not_among_the_training_items():
    for kind in effects.TASK:
        train, held_out = items_of(kind, 0, 32, 20)
        asked = {item["prompt"][-1]["content"] for item in train}
        assert len(train) == 32 and not asked & {item["prompt"][-1]["content"] for item in held_out}


def test_the_record_has_every_setting_and_no_claim_stands_on_nan():
    rows = {row["name"]: row["value"] for row in recorded("sft_effects")["rows"]}
    assert {f"{setting.label}: exact match" for setting in SETTINGS} <= set(rows)
    assert all(math.isfinite(value) for value in rows.values())


@pytest.fixture(scope="module")
def run():
    return one_run(LORA, seed=0, samples=64, test_items=4)


def test_every_measure_is_a_number(run):
    assert all(math.isfinite(value) for value in run.values())


def test_the_noise_of_neftune_is_on_while_training_and_off_while_measuring(run):
    noisy = one_run(replace(LORA, noise=15), seed=0, samples=64, test_items=4)
    assert noisy["training loss"] > run["training loss"]
    assert noisy == one_run(replace(LORA, noise=15), seed=0, samples=64, test_items=4)


def test_a_killed_bench_goes_on_with_the_runs_it_has(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_LAB_HOME", str(tmp_path))
    made = []

    def job(seed):
        if len(made) == 3 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        made.append(seed)
        return {"x: loss": float(seed)}

    killed = []
    monkeypatch.setattr(effects, "jobs", lambda quick: {"x": job})
    with pytest.raises(KeyboardInterrupt):
        effects.run(quick=False)
    rows = effects.run(quick=False)
    assert made == [0, 1, 2, 3, 4] and rows[0]["value"] == 2 and not list(tmp_path.iterdir())


def test_forty_steps_of_sixteen_are_also_ten_of_sixty_four():
    assert effects.SAMPLES % (16 * 4) == 0 and {s.batch for s in SETTINGS} == {4, FULL.batch, 64}
