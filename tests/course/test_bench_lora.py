"""Bench `lora` compares what it says it compares."""

import pytest
import torch

from finetune_lab.course import bench
from finetune_lab.course.bench import lora
from finetune_lab.methods.lora_fused import dora_time_floor, lora_time_floor

SIZE = {"tokens": 16, "widths": {64: 2}, "ranks": (4,), "lora": {64: "<= 9"}, "dora": "<= 9"}


@pytest.fixture(scope="module")
def rows():
    return lora.compare(64, 4, "fp32", SIZE)


def named(rows, part):
    return next(row for row in rows if part in row["name"])


def test_every_row_has_its_own_name(rows):
    assert len({row["name"] for row in rows}) == len(rows)


def test_ours_and_pefts_hold_the_same_values_and_agree(rows):
    for mine in ("LoRA", "DoRA"):
        assert named(rows, f"{mine}: difference to peft")["value"] < 1e-6


def test_the_adapters_of_the_bench_are_not_at_their_start():
    layers = lora.contestants(64, 4, torch.float32)
    x = torch.randn(3, 64)
    frozen = layers["frozen"](x)
    assert all((layer(x) - frozen).norm() > 0.01 * frozen.norm() for name, layer in layers.items() if name != "frozen")


def test_all_layers_stand_on_one_weight():
    layers = lora.contestants(64, 4, torch.bfloat16)
    weight = layers["frozen"].weight
    bases = [getattr(layer, "base", getattr(layer, "base_layer", layer)) for layer in layers.values()]
    assert all(base.weight is weight for base in bases) and len(layers) == 6


def test_the_floor_counts_the_thin_products():
    frozen, thin = 2 * 512 * 2048 * 2048, 6 * 512 * 2048 * 64  # multiplications
    assert lora_time_floor(2048, 64) == pytest.approx((frozen + thin) / frozen)
    norm = 64 * 2048 * 2048
    assert dora_time_floor(2048, 64, 512) == pytest.approx((frozen + thin + norm) / frozen)


def test_saved_bytes_are_those_that_still_live():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(5, 8)

    def forward():
        y = (x * 2) @ weight  # keeps x * 2
        (x @ weight).exp().sum()  # its graph dies here
        return y

    assert lora.saved_bytes(torch.nn.ParameterList([weight]), forward) == 5 * 8 * 4


def test_dora_saves_its_input_its_output_and_thin_tensors(rows):
    activations = 2 * 16 * 64 * 4
    thin = 4 * (16 * 4 + 64 * 4 + 2 * 64)  # x A^T, B^T, g and m
    assert named(rows, "DoRA: saved bytes")["value"] == activations + thin
    assert named(rows, "DoRA: saved bytes")["peer_value"] >= 1.5 * activations


def test_in_the_recorded_run_we_are_no_further_from_fp64_than_peft():
    """At d=4096 ours and peft's fp32 gradients differ by more than 1e-6: the larger error is peft's."""
    errors = [row for row in bench.recorded("lora")["rows"] if "fp32" in row["name"] and "against fp64" in row["name"]]
    assert len(errors) == 12 and all(row["value"] <= 1.1 * row["peer_value"] for row in errors)
