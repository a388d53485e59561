"""Merging whole models, name by name: what lesson 07 and its bench rely on."""

import pytest
import torch

from finetune_lab.course import merge_ways as ways
from finetune_lab.lab import forced
from finetune_lab.lab.models import load
from finetune_lab.methods import merging


@pytest.fixture(scope="module")
def tiny():
    model, _ = load("tiny")
    return model, forced.weights_of(model)


def noisy(weights, seed, size=0.01):
    dice = torch.Generator().manual_seed(seed)
    return {name: w + size * torch.randn(w.shape, generator=dice) for name, w in weights.items()}


@torch.no_grad()
def logits(model, weights):
    return forced.put_weights(model, weights)(torch.tensor([[5, 6, 7, 8]])).logits


def test_a_permuted_model_is_the_same_function_and_other_numbers(tiny):
    model, weights = tiny
    twin = ways.permuted(weights, seed=1)
    torch.testing.assert_close(logits(model, twin), logits(model, weights), rtol=1e-4, atol=1e-4)
    moved = [name for name in weights if not torch.equal(twin[name], weights[name])]
    assert len(moved) == 3 * model.config.num_hidden_layers and all(".mlp." in name for name in moved)


def test_the_average_with_a_permuted_twin_is_another_function(tiny):
    model, weights = tiny
    half = ways.tensorwise(lambda x, y: (x + y) / 2, weights, ways.permuted(weights, seed=1))
    assert (logits(model, half) - logits(model, weights)).abs().max() > 1


def test_onto_base_at_scale_one_with_one_specialist_is_that_specialist(tiny):
    _, weights = tiny
    tuned = noisy(weights, 0)
    back = ways.onto_base(weights, merging.task_arithmetic, [tuned])
    assert all(torch.allclose(back[name], tuned[name], atol=1e-6) for name in weights)


def test_a_third_of_the_sum_is_the_average_of_three(tiny):
    _, weights = tiny
    three = [noisy(weights, seed) for seed in range(3)]
    summed = ways.onto_base(weights, merging.task_arithmetic, three, 1 / 3)
    mean = ways.tensorwise(lambda *t: merging.linear(t), *three)
    assert all(torch.allclose(summed[name], mean[name], atol=1e-6) for name in weights)


def test_every_family_merges_and_a_seed_repeats_it(tiny):
    _, weights = tiny
    some = dict(list(weights.items())[:3])
    three = [noisy(some, seed) for seed in range(3)]
    for name in ways.families(0):
        one, again = (ways.onto_base(some, ways.families(7)[name], three) for _ in range(2))
        assert all(torch.equal(one[key], again[key]) for key in some), name
        assert all(one[key].isfinite().all() for key in some), name


def adapters(weights, path, seed):
    dice = torch.Generator().manual_seed(seed)
    out, fan_in = weights[f"{path}.weight"].shape
    A, B = torch.randn(4, fan_in, generator=dice), torch.randn(out, 4, generator=dice)
    return {path: merging.Adapter(A, B, 2.0)}


def test_concatenated_adapters_add_half_of_each_update_and_added_factors_do_not(tiny):
    _, weights = tiny
    path = "model.layers.0.mlp.up_proj"
    pair = [adapters(weights, path, seed) for seed in (0, 1)]
    found = ways.adapter_ways(weights, pair)
    wanted = weights[f"{path}.weight"] + sum(0.5 * merging.update(each[path]) for each in pair)
    assert torch.allclose(found["adapters cat lam=0.5"][f"{path}.weight"], wanted, atol=1e-4)
    assert not torch.allclose(found["adapters linear lam=0.5"][f"{path}.weight"], wanted, atol=1)


def test_small_updates_are_lost_on_the_4_bit_grid_and_not_beside_it(tiny):
    _, weights = tiny
    name = "model.layers.0.mlp.up_proj.weight"
    some = {name: weights[name]}
    tuned = noisy(some, 0, size=1e-4)
    found = ways.four_bit_ways(some, [tuned], {name})
    on_grid = ways.four_bit_ways(some, [some], {name})["on the NF4 base"][name]  # nothing was learnt: the rounded base
    update = 0.5 * (tuned[name] - some[name])
    rounded = found["on the NF4 base, then NF4"][name] - on_grid
    assert (rounded * update).sum() < 0.3 * (update * update).sum()
    beside = found["on the NF4 base"][name] - on_grid
    torch.testing.assert_close(beside, update, rtol=1e-2, atol=1e-6)


def test_interference_of_a_model_with_itself_is_none_and_with_its_opposite_all(tiny):
    _, weights = tiny
    tuned = noisy(weights, 0)
    opposite = {name: 2 * weights[name] - tuned[name] for name in weights}
    same, against = (ways.interference(weights, [tuned, other]) for other in (tuned, opposite))
    assert same["cosine"] == pytest.approx(1, abs=1e-3) and same["sign conflicts"] == 0
    assert against["cosine"] == pytest.approx(-1, abs=1e-3) and against["sign conflicts"] > 0.99
