"""The bench of lesson 04 compares what it says it compares."""

import copy

import pytest
import torch
from torch import nn

from finetune_lab.course import bench
from finetune_lab.course.bench import qlora
from finetune_lab.lab.models import load
from finetune_lab.methods.inject import active_layers, find_targets, inject
from finetune_lab.methods.qlora import quantize_linears, replace_adapters


@pytest.fixture(scope="module")
def base():
    return load("tiny")[0]


@pytest.fixture(scope="module")
def run():
    """The shortest QLoRA run: three steps, on few items."""
    setting, test = qlora.SETTINGS, {"math": ("math", 100, 3, 1e-3, 4)}
    qlora.SETTINGS = test
    try:
        yield qlora.trained("math", "QLoRA", 0)
    finally:
        qlora.SETTINGS = setting
        qlora.trained.cache_clear()


def test_rounding_touches_the_linear_layers_and_nothing_else(base):
    changed = qlora.rounded(base, qlora.CODES["NF4"], 64)
    targets = {f"{path}.weight" for path in find_targets(base, "all-linear")}
    other = changed.state_dict()
    assert {name for name, w in base.state_dict().items() if not torch.equal(w, other[name])} == targets


def test_one_scale_a_tensor_is_the_largest_block(base):
    weight = base.get_submodule(find_targets(base, "all-linear")[0]).weight
    changed = qlora.rounded(base, qlora.CODES["INT4"], qlora.TENSOR)
    levels = changed.get_submodule(find_targets(base, "all-linear")[0]).weight.unique()
    assert len(levels) <= 15 and levels.abs().max() == weight.abs().max()


def test_a_run_gives_every_figure_and_a_4_bit_base(run):
    model, _, figures = run
    assert set(figures) == {"exact match", "held-out answer loss", "training loss", "CPU seconds", "weight bytes"}
    weights = sum(layer.in_features * layer.out_features for layer in active_layers(model).values())
    assert 4.12 < 8 * figures["weight bytes"] / weights < 4.14


def test_lora_and_qlora_start_from_the_same_adapters(base):
    starts = []
    for model in (copy.deepcopy(base), quantize_linears(copy.deepcopy(base))):
        torch.manual_seed(3)
        starts.append([layer.A.detach() for layer in active_layers(inject(model, r=4, alpha=8)).values()])
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_every_way_to_merge_leaves_one_linear_layer_a_place(run, base):
    model, _, _ = run
    for name, way in qlora.ways(base).items():
        merged = replace_adapters(copy.deepcopy(model), way)
        layers = [merged.get_submodule(path) for path in find_targets(base, "all-linear")]
        kind = "NF4Linear" if name == "in 4 bit" else "Linear"
        assert {type(layer).__name__ for layer in layers} == {kind}, name


def test_merging_onto_the_original_base_differs_by_the_rounding_error(run, base):
    model, _, _ = run
    path, layer = next(iter(active_layers(model).items()))
    ways = qlora.ways(base)
    difference = ways["original base"](path, layer).weight - ways["dequantised base"](path, layer).weight
    torch.testing.assert_close(
        difference, base.get_submodule(path).weight - layer.base.dequantize(), atol=1e-6, rtol=1e-4
    )


def test_rows_are_means_and_standard_deviations():
    rows = qlora._rows("x", [{"a": 1.0}, {"a": 3.0}], "y", [{"a": 2.0}, {"a": 2.0}])
    assert [(row["name"], row["value"], row["peer_value"]) for row in rows] == [
        ("x: a", 2.0, 2.0),
        ("x: a, standard deviation", 2**0.5, 0.0),
    ]


def test_the_update_is_measured_against_the_weights(base):
    model = inject(copy.deepcopy(base), r=2, alpha=4)
    for layer in active_layers(model).values():
        nn.init.zeros_(layer.B)
    assert qlora.relative_norms(model, base) == {"update relative to the weights": 0.0, "rounding error": 0.0}


def test_the_recorded_run_has_five_seeds_worth_of_every_row_once():
    rows = bench.recorded("qlora")["rows"]
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    assert all(f"{name}, standard deviation" in names for name in names if not name.endswith("deviation"))
