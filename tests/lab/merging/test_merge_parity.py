"""`finetune-lab merge` against mergekit's own run_merge: the same YAML and the same models give the same weights."""

import json

import pytest
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

from finetune_lab.lab import merging

GRADIENT = [0.1, 0.9, 0.4]
FILTERS = [{"filter": "self_attn", "value": [0.2, 1.0]}, {"filter": "down_proj", "value": 0.8}, {"value": 0.5}]
CASES = {
    "linear": lambda r, f: r("linear", {"weight": 0.7}, {"weight": 0.5}),
    "linear, not normalised": lambda r, f: r("linear", {"weight": 0.7}, {"weight": -0.5}, normalize=False),
    "linear, gradient and filters": lambda r, f: r("linear", {"weight": GRADIENT}, {"weight": FILTERS}),
    "linear, weight of all": lambda r, f: r("linear", {}, {}, weight=FILTERS, more={"base_model": str(f.base)}),
    "slerp": lambda r, f: r("slerp", None, {}, t=0.3),
    "slerp, gradient and filters": lambda r, f: r("slerp", None, {}, t=FILTERS),
    "task arithmetic": lambda r, f: r("task_arithmetic", {"weight": 1.0}, {"weight": -0.4}),
    "task arithmetic, lambda": lambda r, f: r(
        "task_arithmetic", {"weight": 0.7}, {"weight": GRADIENT}, **{"lambda": 0.6, "normalize": True}
    ),
    "ties": lambda r, f: r("ties", {"weight": 0.7, "density": 0.4}, {"weight": 0.3, "density": 0.2}),
    "ties, not normalised": lambda r, f: r(
        "ties", {"weight": 0.7, "density": 0.4}, {"weight": 0.3}, normalize=False, int8_mask=True
    ),
    "ties, gradient and filters": lambda r, f: r(
        "ties", {"weight": FILTERS}, {"weight": 1, "density": GRADIENT}, density=0.5, **{"lambda": GRADIENT}
    ),
    "dare_linear, nothing dropped": lambda r, f: r("dare_linear", {"weight": 0.7}, {"weight": 0.6, "density": 1}),
    "dare_ties, nothing dropped": lambda r, f: r("dare_ties", {"weight": 0.7}, {"weight": 0.6}, normalize=True),
    "slices": lambda r, f: r("slerp", t=FILTERS, more={"models": None, "slices": stacked(f, [(0, 3), (2, 3), (1, 4)])}),
    "slices with their own weights": lambda r, f: r(
        "linear", more={"models": None, "slices": stacked(f, [(1, 3), (0, 4)], weight=GRADIENT)}, weight=0.3
    ),
}


def stacked(family, ranges, **parameters):
    """Slices of the two models, the second slice with settings of its own."""
    found = [{"sources": [{"model": str(m), "layer_range": list(r)} for m in (family.base, family.b)]} for r in ranges]
    found[1]["parameters"] = parameters
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_command_writes_what_mergekit_writes(case, recipe, family, tensors, tmp_path):
    config = {key: value for key, value in CASES[case](recipe, family).items() if value is not None}
    run_merge(
        MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), MergeOptions(quiet=True, random_seed=0)
    )
    merging.merge(config, tmp_path / "ours", progress=False)
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-6
    layers = [
        json.loads((tmp_path / who / "config.json").read_text())["num_hidden_layers"] for who in ("ours", "theirs")
    ]
    assert layers[0] == layers[1]
