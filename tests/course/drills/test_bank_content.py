"""The cards, cases and numbers of the bank: sizes, and answers against figures that were worked out by hand.

`test_bank.py` holds what every item must keep; here each number drill meets one value that the package did not compute.
"""

import re

import pytest

from finetune_lab.course.drills import numbers, schema
from finetune_lab.course.drills.schema import Card, Case, Number

ITEMS = schema.load()
CARDS = [item for item in ITEMS if isinstance(item, Card)]
CASES = [item for item in ITEMS if isinstance(item, Case)]
NUMBERS = {item.id: item for item in ITEMS if isinstance(item, Number)}

LLAMA3_8B = {"hidden": 4096, "intermediate": 14336, "kv": 1024, "layers": 32}
LLAMA2_7B = {"hidden": 4096, "intermediate": 11008, "kv": 4096, "layers": 32}

# id -> drawn values, the answer worked out by hand or published (peft's printed counts, the papers' tables)
BY_HAND = {
    "number-lora-one-matrix": ({"shape": {"fan_in": 4096, "fan_out": 1024}, "rank": 16}, 81_920),
    "number-lora-reduction": ({"width": 4096, "rank": 8}, 256),
    "number-lora-all-linear": ({"model": LLAMA3_8B, "rank": 16}, 41_943_040),
    "number-lora-attention-gqa": ({"kv": {"heads": 8, "width": 1024}, "rank": 16}, 13_631_488),
    "number-dora-magnitudes": ({"model": LLAMA2_7B}, 1_359_872),
    "number-vera-vectors": ({"model": LLAMA2_7B, "rank": 256}, 1_359_872 + 224 * 256),
    "number-lora-xs": ({"rank": 16, "matrices": 224}, 57_344),
    "number-prefix-tuning": ({"tokens": 20, "model": LLAMA3_8B}, 1_310_720),
    "number-prompt-tuning": ({"tokens": 20, "hidden": 4096}, 81_920),
    "number-bottleneck-adapter": ({"hidden": 1024, "bottleneck": 64, "depth": {"adapters": 24}}, 24 * 132_160),
    "number-ia3": ({"model": LLAMA2_7B}, 614_400),
    "number-galore-state": ({"rows_": 2048, "columns": 5461, "rank": 128}, 2048 * 128 + 2 * 5461 * 128),
    "number-full-fine-tuning-bytes": ({"billions": 7, "regime": "mixed precision with fp32 master"}, 112),
    "number-adapter-state-bytes": ({"millions": 41.94}, 671.04),
    "number-qlora-weights": ({"model": {"linear": 6.979, "rest": 1.051}, "rest_bytes": 2}, 5.702),
    "number-nf4-bits": ({"block": 64}, 4.126953125),
    "number-double-quantisation-saving": ({"billions": 6.74}, 0.3143),
    "number-logits-bytes": ({"batch": 4, "sequence": 4096, "vocabulary": 128256}, 8.4054),
    "number-checkpointed-activations": ({"batch": 4, "sequence": 4096, "model": {"hidden": 4096, "layers": 32}}, 4.295),
    "number-adapter-file": ({"millions": 41.94, "precision": {"bytes": 2}}, 83.88),
    "number-adapters-that-fit": ({"cache": {"bytes": 8e9}, "parameters": 41_943_040, "bytes": 2}, 95),
    "number-kv-cache": ({"tokens": 8192, "model": LLAMA3_8B}, 1.0737),
    "number-zero-bytes-per-rank": ({"billions": 7, "ranks": 8, "stage": 2}, 26.25),
    "number-zero-traffic": ({"size": {"n": 7e9}, "stage": 3}, 21e9),
    "number-pipeline-bubble": ({"stages": 4, "micro_batches": 16, "chunks": 1}, 0.1579),
    "number-1f1b-in-flight": ({"stages": 4, "micro_batches": 16, "stage": 1}, 3),
    "number-effective-batch": ({"micro": 2, "accumulation": 8, "devices": 4}, 64),
    "number-optimizer-steps": ({"rows_": 1000, "batch": 16, "epochs": 3}, 189),
    "number-warmup-share": ({"steps": 189, "share": 0.03}, 6),
    "number-token-mean": ({"short_loss": 2.0, "long_loss": 4.5, "short_tokens": 4, "long_tokens": 36}, 4.25),
    "number-lora-flops": ({"billions": 8, "million_tokens": 100}, 3200),
    "number-lora-scaling": ({"pair": {"r": 64, "alpha": 128}}, 16),
    "number-neftune-bound": ({"alpha": 5, "length": 512, "width": 4096}, 0.0034527),
    "number-replay-rows": ({"new_rows": 1900, "share": 0.05}, 100),
    "number-dpo-loss": ({"chosen": -5.0, "rejected": -20.0, "beta": 0.1}, 0.2014),
    "number-ipo-start": ({"beta": 0.1}, 25),
    "number-reward-model-loss": ({"margin": 2.0}, 0.1269),
    "number-grpo-advantage": ({"group": 8, "successes": 1}, 2.4749),
    "number-dare-noise": ({"drop": 0.9}, 3.1623),
    "number-dare-collision": ({"drop": 0.9, "models": 10}, 0.2639),
    "number-ties-element": ({"a": 1.0, "b": 0.4, "c": -0.3, "d": -0.4, "e": -0.3}, 0.7),
    "number-slerp-weight": ({"cosine": 0.0, "t": 0.5}, 0.70711),
    "number-accuracy-interval": ({"accuracy": 0.6, "items": 200}, 0.0679),
    "number-random-code-floor": ({"codes": 9000, "tokens": 11}, 0.8277),
}


@pytest.mark.parametrize("id", BY_HAND)
def test_a_number_drill_gives_the_figure_worked_out_by_hand(id):
    values, expected = BY_HAND[id]
    assert numbers.evaluate(NUMBERS[id], values) == pytest.approx(expected, rel=5e-4)


def test_every_number_drill_has_such_a_figure():
    assert {id for id, item in NUMBERS.items() if item.file == "numbers.yml"} == set(BY_HAND)


def test_there_are_enough_cards_of_every_level_and_enough_cases_and_numbers():
    levels = [card.level for card in CARDS]
    assert len(CARDS) >= 36 and min(levels.count(level) for level in schema.LEVELS) >= 10
    assert len(CASES) >= 8 and len(NUMBERS) >= 16


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_a_card_can_be_said_in_two_minutes_and_is_followed_up(card):
    words = len(card.answer.split())
    assert 60 <= words <= 165, f"{words} words"
    assert all(one.question.strip().endswith(("?", ".")) and one.answer.strip() for one in card.follow_ups)
    assert card.wrong.says.strip() != card.wrong.because.strip()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_case_is_answered_at_length_and_scored_on_points_of_unequal_weight(case):
    assert 200 <= len(case.answer.split()) <= 450
    assert len({point.weight for point in case.rubric}) > 1
    assert len({point.point for point in case.rubric}) == len(case.rubric)


def test_papers_that_an_answer_cites_are_among_its_sources():
    for item in (*CARDS, *CASES):
        texts = [item.answer, *(one.answer for one in getattr(item, "follow_ups", ()))]
        if isinstance(item, Card):
            texts.append(item.wrong.because)
        cited = set(re.findall(r"(?<![\d.])(\d{4}\.\d{5})(?!\d)", " ".join(texts)))
        assert cited <= {source.arxiv for source in item.sources}, item.id
