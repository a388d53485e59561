"""The figures behind the drills of lesson 02, each against one that the estimator did not compute."""

import pytest

from finetune_lab.course.drills import numbers, schema
from finetune_lab.methods.memory import questions

ITEMS = {item.id: item for item in schema.load() if item.file == "lesson_02.yml"}
LLAMA3_8B = {"preset": "llama-3.1-8b"}
TOKENS = 1024
A_LAYER = 12 * 4096 + 8 + 4 * 4096 + 4 * (4096 + 1024) + 4 * 32 + 8 * 14336  # bytes a token, counted by hand
WITH_ADAPTERS = A_LAYER + 12 * 4096 + 2 * 14336 + 4 * 4096 + 28 * 16  # fp32 copies of inputs for fp32 adapters

# id -> drawn values, the answer by hand (closed form of saved tensors, peft's counts, bytes of NF4), tolerance
BY_HAND = {
    "number-gib-of-a-card": ({"card": {"gib": 14.56}}, 15.6337, 1e-4),
    "number-8bit-adam-state": ({"size": {"n": 134_515_008}}, 134.515008 * (2 + 8 / 256), 1e-4),
    "number-layer-activations": ({"model": LLAMA3_8B, "tokens": TOKENS}, A_LAYER * TOKENS / 1e6, 1e-6),
    "number-standing-bytes": ({"model": LLAMA3_8B, "method": "qlora"}, 3.600 + 4.203 + 0.671, 2e-3),
    "number-peak-of-a-step": (
        # weights, adapters and their states; inputs of 32 layers; 12 bytes a logit
        {"model": "llama-3.1-8b", "method": "lora", "seq": 4096},
        2 * 8.03026 + 12 * 0.041943 + 4096 * (2 * 4096 * 32 + 12 * 128_256) / 1e9, 0.03,
    ),
    "number-checkpointing-saves": (
        {"model": "llama-3.1-8b", "seq": 4096}, 32 * 4096 * (WITH_ADAPTERS - 2 * 4096) / 1e9, 0.01,
    ),
    "number-logits-at-the-peak": ({"model": {"preset": "llama-3.2-1b"}, "seq": 4096}, 12 * 4096 * 128_256 / 1e9, 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("id", BY_HAND)
def test_a_drill_gives_the_figure_worked_out_by_hand(id):
    values, expected, tolerance = BY_HAND[id]
    assert numbers.evaluate(ITEMS[id], values) == pytest.approx(expected, rel=tolerance)


def test_only_the_solver_has_no_such_figure():
    drills = {id for id, item in ITEMS.items() if item.kind == "number"}
    assert drills - set(BY_HAND) == {"number-most-sequences"}


def test_checkpointing_makes_room_for_more_sequences():
    without, with_ = (questions.most_sequences("llama-3.2-1b", 1024, "RTX-3090", on) for on in (False, True))
    assert 0 < without < with_
