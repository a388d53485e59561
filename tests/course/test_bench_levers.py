"""The bench of levers compares what it says, and its recorded run keeps its goals."""

import torch

from finetune_lab.course import bench
from finetune_lab.course.bench import levers

SIZE = {"batch": 1, "seq": 32}


def test_a_checkpointed_layer_keeps_its_input_and_nothing_else():
    kept = levers.layer_bytes("checkpointing", torch.float32, SIZE)
    assert kept == SIZE["seq"] * levers.SHAPE["hidden_size"] * 4


def test_fp32_adapters_on_a_bf16_base_make_a_layer_keep_more():
    ratio = levers.layer_bytes("LoRA all-linear r=16", torch.bfloat16, SIZE) / levers.layer_bytes(
        "", torch.bfloat16, SIZE
    )
    assert 1.4 < ratio < 1.6


def test_lora_saves_the_work_of_weight_gradients_only():
    small = {"layers": 1, "batch": 1, "seq": 16}
    full, lora = (
        levers.flops(levers.step_of(levers.build(1, torch.float32, name), small)) for name in ("", "LoRA q,v r=8")
    )
    assert 2 / 3 - 0.02 < lora / full < 0.72


def test_the_recorded_run_keeps_its_goals():
    rows = bench.recorded("levers")["rows"]
    assert [row["name"] for row in rows if row["holds"] is False] == []
    assert sum(row["holds"] is True for row in rows) >= 10
