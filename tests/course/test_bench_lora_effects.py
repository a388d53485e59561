"""The bench of lesson 03 compares what it says it compares."""

import math
from dataclasses import replace

import pytest
import torch

from finetune_lab.course.bench import lora_effects as effects
from finetune_lab.course.bench.lora_effects import BASE, FULL, NEW, SETTINGS, adapted, codes, matrices
from finetune_lab.lab.models import load
from finetune_lab.methods.inject import active_layers
from finetune_lab.methods.trainable import trainable_report


def trainable(setting):
    return trainable_report(adapted(load("tiny")[0], setting, 0)[0])["trainable"]


def test_every_setting_has_its_own_name():
    assert len({setting.label for setting in SETTINGS}) == len(SETTINGS)


def test_what_is_looked_into_is_measured():
    assert effects.LOOKED_INTO <= set(SETTINGS)


def test_attention_alone_has_as_many_numbers_as_all_layers_and_feed_forward_hardly_more():
    everywhere = trainable(BASE)
    assert trainable(replace(BASE, rank=38, where="attention")) == everywhere
    assert 1 < trainable(replace(BASE, rank=28, where="feed-forward")) / everywhere < 1.02


def test_settings_of_one_seed_start_from_the_same_function():
    ids = torch.tensor([[5, 6, 7]])
    start = load("tiny")[0](ids).logits
    for setting in (BASE, FULL, replace(BASE, method="DoRA")):
        torch.testing.assert_close(adapted(load("tiny")[0], setting, 0)[0](ids).logits, start, rtol=1e-4, atol=1e-4)


def test_lora_plus_trains_b_faster_and_a_at_the_named_rate():
    setting = replace(BASE, method="LoRA+", ratio=4, lr=1e-3)
    model, groups = adapted(load("tiny")[0], setting, 0)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    layer = next(iter(active_layers(model).values()))
    assert (rate[id(layer.A)], rate[id(layer.B)]) == (1e-3, 4e-3)


def test_seeds_change_the_start_of_a():
    first, second = (
        next(iter(active_layers(adapted(load("tiny")[0], BASE, seed)[0]).values())).A for seed in (0, 1)
    )  # fmt: skip
    assert not torch.equal(first, second)


def test_codes_are_different_questions_with_four_digits_and_a_seed_repeats_them():
    items = codes(48, seed=3)
    assert len({item["prompt"][0]["content"] for item in items}) == 48
    assert all(item["completion"][0]["content"][6:10].isdigit() for item in items)
    assert items == codes(48, seed=3) != codes(48, seed=4)


def test_matrices_are_those_that_act():
    model = adapted(load("tiny")[0], NEW, 0)[0]
    before = matrices(load("tiny")[0])
    assert all(torch.equal(weight, before[path]) for path, weight in matrices(model).items())
    path, layer = next(iter(active_layers(model).items()))
    layer.B.data.normal_()
    torch.testing.assert_close(matrices(model)[path] - before[path], layer.delta(), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def run():
    return effects.one_run(BASE, seed=0, steps=4, test_items=5)


def test_a_lora_update_has_all_its_energy_in_its_rank_and_a_full_one_has_not(run):
    assert run["rank for 90 % of the energy"] <= BASE.rank
    full = effects.one_run(FULL, seed=0, steps=4, test_items=5)
    assert full["energy in the first 4"] < run["energy in the first 4"] <= 1


def test_every_measure_is_a_number(run):
    assert all(math.isfinite(value) for value in run.values())
