"""The bench of lesson 06 compares what it says it compares."""

import copy
import math
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch

from finetune_lab.course import bench
from finetune_lab.course.bench import dpo_effects as effects
from finetune_lab.course.bench.dpo_effects import DPO, LONGER, SETTINGS, SHORTER


@pytest.fixture(scope="module", autouse=True)
def short_sft():
    """The tests need a model that is not the base, not a good one."""
    short = replace(effects.TINY.recipes["reply"], steps=2, items=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effects, "TINY", replace(effects.TINY, recipes={"reply": short}))
        patch.setattr(effects, "PROMPTS", 6)
        effects.start.cache_clear()
        yield
    for cached in (effects.start, effects.reference_of, effects.one_run):
        cached.cache_clear()


def test_every_setting_has_its_own_name():
    assert len({setting.label for setting in SETTINGS}) == len(SETTINGS)


def test_flips_are_a_share_of_the_pairs_and_swapped_is_all_of_them():
    right, none = effects.pairs_of(DPO, seed=0, n=60)
    noisy, flips = effects.pairs_of(replace(DPO, flipped=0.3), seed=0, n=60)
    assert not any(none) and 0.15 < sum(flips) / 60 < 0.45
    for pair, other, flipped in zip(right, noisy, flips, strict=True):
        assert (pair["chosen"] == other["rejected"]) == flipped and (pair == other) != flipped
    assert all(effects.pairs_of(replace(DPO, mistake="swapped"), seed=0, n=60)[1])


def test_length_decides_which_pairs_are_taken():
    for only, sign in ((LONGER, 1), (SHORTER, -1)):
        for pair in effects.pairs_of(replace(DPO, only=only), seed=1, n=20)[0]:
            chosen, rejected = (len(pair[key][0]["content"].split()) for key in ("chosen", "rejected"))
            assert sign * (chosen - rejected) > 0


def test_the_kept_reference_is_what_the_loop_would_compute_itself():
    """The first step of a run with the cached reference has the loss ln 2, flipped labels or not."""
    model, tokenizer, *_ = effects.start(0)
    for setting in (DPO, replace(DPO, flipped=0.5), replace(DPO, mistake="swapped")):
        history = effects.trained(replace(setting, steps=1), 0, copy.deepcopy(model), tokenizer)
        assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_each_mistake_is_made():
    model, tokenizer, *_ = effects.start(0)
    steps = {what: effects.trained(replace(DPO, steps=2, lr=1e-3, mistake=what), 0, copy.deepcopy(model), tokenizer)
             for what in ("", "forgotten", "identical")}  # fmt: skip
    assert [row["loss"] for row in steps["identical"]] == pytest.approx([math.log(2)] * 2, abs=1e-3)
    assert abs(steps["forgotten"][0]["loss"] - math.log(2)) > 0.05
    assert steps[""][1]["loss"] < steps[""][0]["loss"]


def test_a_run_leaves_the_start_alone_and_every_measure_is_a_number():
    model, *_ = effects.start(0)
    before = copy.deepcopy(model.state_dict())
    run = effects.one_run(replace(DPO, steps=2, loss="kto"), 0)
    assert all(math.isfinite(value) for value in run.values()) and run["KL"] > 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_without_sft_the_run_begins_at_the_base():
    base, *_ = effects.start(0, sft=False)
    assert not torch.equal(base.lm_head.weight, effects.start(0)[0].lm_head.weight)


def test_the_summary_and_the_values_of_the_seeds_are_of_the_same_runs():
    rows = {row["name"]: row["value"] for row in bench.recorded("dpo_effects")["rows"]}
    for setting in SETTINGS:
        for measure in effects.BY_SEED:
            name = f"{setting.label}: {measure}"
            seeds = [rows[f"{name}, seed {seed}"] for seed in range(5)]
            assert rows[name] == pytest.approx(mean(seeds)), name
            assert rows[f"{name}, standard deviation"] == pytest.approx(stdev(seeds)), name


def test_a_paired_difference_is_the_t_interval_of_the_five_gaps(monkeypatch):
    gaps = (1.0, 2.0, 3.0, 4.0, 5.0)
    rows = [{"name": f"{label}: good, seed {seed}", "value": 10.0 * seed + (gap if label == "a" else 0)}
            for label in "ab" for seed, gap in enumerate(gaps)]  # fmt: skip
    monkeypatch.setattr(effects.bench, "recorded", lambda name: {"rows": rows})
    middle, half = effects.paired("a", "b", "good")
    assert middle == pytest.approx(3.0) and half == pytest.approx(1.9632, abs=1e-3)  # scipy.stats.t.interval
