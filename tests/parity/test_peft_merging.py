"""Our merging of task vectors and adapters against peft's merge_utils and add_weighted_adapter."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from torch import nn

from finetune_lab.methods.merging import (
    Adapter,
    concatenate,
    dare_linear,
    dare_ties,
    elect_sign,
    factorize,
    linear_factors,
    svd,
    task_arithmetic,
    ties,
    ties_merge,
    trim,
    update,
)

pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")


def vectors(models, *shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(models)
    return [torch.randn(shape, generator=g, dtype=dtype) for _ in range(models)]


def worst(a, b):
    return (a - b).abs().max().item()


SHAPES = pytest.mark.parametrize(("models", "shape"), [(2, (7, 5)), (3, (64, 33)), (5, (11,))])


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_papers_ties_equals_pefts_for_weights_of_one(models, shape, density, dtype):
    tau = vectors(models, *shape, dtype=dtype)
    theirs = merge_utils.ties(tau, torch.ones(models, dtype=dtype), density, "total")
    assert worst(ties_merge(tau, density), theirs) <= 1e-6


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@SHAPES
def test_ties_with_pefts_convention_equals_pefts_for_any_weights(models, shape, density):
    tau, w = vectors(models, *shape), [0.7, 0.3, -0.5, 1.5, 0.1][:models]
    assert worst(ties(tau, density, w, "peft"), merge_utils.ties(tau, torch.tensor(w), density)) <= 1e-6


@SHAPES
def test_task_arithmetic_and_trimming_equal_pefts(models, shape):
    tau, w = vectors(models, *shape), [0.7, 0.3, -0.5, 1.5, 0.1][:models]
    assert worst(task_arithmetic(tau, w), merge_utils.task_arithmetic(tau, torch.tensor(w))) <= 1e-6
    trimmed = task_arithmetic([trim(t, 0.3) for t in tau], w)
    assert worst(trimmed, merge_utils.magnitude_prune(tau, torch.tensor(w), 0.3)) <= 1e-6


def test_the_elected_sign_is_pefts_total_and_not_its_frequency():
    tau = torch.stack(vectors(3, 100, 100))
    agrees = tau.sign() == elect_sign(tau)
    assert torch.equal(agrees, merge_utils.calculate_majority_sign_mask(tau, "total"))
    by_count = merge_utils.calculate_majority_sign_mask(tau, "frequency")
    assert (agrees != by_count).any(0).float().mean() > 0.1


@pytest.mark.parametrize("w", [[1.0, 1.0, 1.0], [0.7, 0.3, -0.5]])
def test_given_pefts_masks_dare_equals_pefts(w, monkeypatch):
    """peft keeps where bernoulli(density) is 1, we where rand() >= p: both get the masks of one generator."""
    tau, p = vectors(3, 40, 30), 0.6
    masks = [(torch.rand(40, 30, generator=torch.Generator().manual_seed(i)) >= p).float() for i in range(3)]
    for name, ours in (("dare_linear", dare_linear), ("dare_ties", dare_ties)):
        pending = iter(masks)
        monkeypatch.setattr(torch, "bernoulli", lambda *_, pending=pending, **__: next(pending))
        theirs = getattr(merge_utils, name)(tau, torch.tensor(w), 1 - p)
        pending = iter(masks)
        monkeypatch.setattr(torch, "rand", lambda *_, pending=pending, **__: torch.where(next(pending) == 1, 0.99, 0.0))
        mine = ours(tau, p, w) if ours is dare_linear else ours(tau, p, w, convention="peft")
        monkeypatch.undo()
        assert torch.equal(mine, theirs), name


@pytest.fixture(scope="module")
def trained():
    """A linear layer with two peft adapters of random values; and the same as ours."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(nn.Sequential(nn.Linear(40, 30)), config, adapter_name="one")
        model.add_adapter("two", LoraConfig(r=4, lora_alpha=10, target_modules=["0"]))
    layer = model.base_model.model[0]
    ours = []
    for name in ("one", "two"):
        for part in (layer.lora_A, layer.lora_B):
            nn.init.normal_(part[name].weight, std=0.3)
        ours.append(Adapter(layer.lora_A[name].weight.data, layer.lora_B[name].weight.data, layer.scaling[name]))
    return model, layer, ours


WEIGHTS = [[0.5, 0.5], [0.7, -0.3]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_adapters_merge_as_with_add_weighted_adapter(trained, kind, weights):
    model, layer, ours = trained
    name = f"{kind} {WEIGHTS.index(weights)}"
    model.add_weighted_adapter(["one", "two"], weights, name, combination_type=kind)
    merged = {"cat": concatenate, "svd": svd, "linear": linear_factors}[kind](ours, weights)
    assert merged.A.shape == layer.lora_A[name].weight.shape
    assert worst(update(merged), layer.get_delta_weight(name).detach()) <= 1e-6


def test_pefts_linear_is_as_far_from_the_sum_of_updates_as_nothing_at_all(trained):
    """Trap: "linear" adds A and B apart. "cat" is exact, "svd" the best of its rank."""
    model, layer, ours = trained
    exact = update(ours[0]) / 2 + update(ours[1]) / 2
    error = {}
    for kind in ("cat", "svd", "linear"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], f"error {kind}", combination_type=kind)
        error[kind] = ((layer.get_delta_weight(f"error {kind}") - exact).norm() / exact.norm()).item()
    assert error["cat"] < 1e-6 < error["svd"] < 0.7 < error["linear"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_ties_of_updates_brought_back_to_a_rank_is_pefts_ties_svd(trained, weights):
    model, layer, ours = trained
    name = f"ties_svd {WEIGHTS.index(weights)}"
    model.add_weighted_adapter(["one", "two"], weights, name, combination_type="ties_svd", density=0.5)
    merged = factorize(ties([update(a) for a in ours], 0.5, weights, "peft"), 4)
    assert worst(update(merged), layer.get_delta_weight(name).detach()) <= 1e-6
