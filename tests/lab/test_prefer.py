"""The preference loop: what it learns, from which reference, and which mistakes it shows."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.errors import UserError
from finetune_lab.lab import models, pairs, prefer, tasks
from finetune_lab.lab.train import add_lora
from finetune_lab.methods import preference

TOKENIZER = models.load_tokenizer("tiny")
ROWS = pairs.as_pairs(tasks.load_task("reply", "train", 8))
SHORT = {"steps": 6, "batch_size": 4, "lr": 3e-3, "warmup": 1}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("loss", prefer.LOSSES)
def test_every_loss_learns_the_pairs(model, loss):
    rows = prefer.dpo(model, TOKENIZER, ROWS, loss=loss, beta=2.0 if loss == "simpo" else 0.1, **SHORT)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["margin"] > rows[0]["margin"]


@pytest.mark.parametrize("reference", ["precomputed", "adapter off"])
def test_training_starts_at_log_two_and_half_right(model, reference):
    first = prefer.dpo(add_lora(model, 4), TOKENIZER, ROWS, reference=reference, **SHORT)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["accuracy"] == 0.5
    assert first["margin"] == pytest.approx(0, abs=1e-5)


def test_every_way_to_the_reference_gives_the_same_run(model):
    start = add_lora(model, 4)
    table = prefer.pair_logps_of(start, TOKENIZER, ROWS)
    other = copy.deepcopy(start)
    losses = []
    for reference in ("precomputed", "adapter off", table, other):
        rows = prefer.dpo(copy.deepcopy(start), TOKENIZER, ROWS, reference=reference, **SHORT)
        losses.append([row["loss"] for row in rows])
    assert all(each == pytest.approx(losses[0], abs=1e-5) for each in losses[1:])


def test_a_shared_prompt_changes_time_and_not_the_run(model):
    plain = prefer.dpo(copy.deepcopy(model), TOKENIZER, ROWS, **SHORT)
    shared = prefer.dpo(model, TOKENIZER, ROWS, logps=pairs.shared_pair_logps, **SHORT)
    assert [row["loss"] for row in shared] == pytest.approx([row["loss"] for row in plain], abs=1e-5)


def test_a_reference_that_is_the_policy_itself_keeps_the_loss_at_log_two_for_ever(model):
    """The mistake 'identical': the curve is flat, the margin 0, and yet the weights move."""
    before = copy.deepcopy(model)
    rows = prefer.dpo(model, TOKENIZER, ROWS, reference=model, **SHORT)
    assert [row["loss"] for row in rows] == pytest.approx([math.log(2)] * 6, abs=1e-5)
    moved = prefer.pair_figures(model, TOKENIZER, ROWS, reference=before)
    assert moved["margin"] > 0.01


def test_swapped_pairs_teach_the_rejected_answer(model):
    before = copy.deepcopy(model)
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    prefer.dpo(model, TOKENIZER, swapped, **SHORT)
    assert prefer.pair_figures(model, TOKENIZER, ROWS, reference=before)["margin"] < 0


def test_a_loss_of_ones_own_gets_the_four_log_probabilities(model):
    seen = []

    def loss(*logps_and_beta):
        seen.append([getattr(x, "shape", x) for x in logps_and_beta])
        return preference.dpo_loss(*logps_and_beta)

    rows = prefer.dpo(model, TOKENIZER, ROWS, loss=loss, **SHORT)
    assert seen[0] == [(4,)] * 4 + [0.1] and rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_figures_of_an_untouched_policy_are_ties(model):
    figures = prefer.pair_figures(model, TOKENIZER, ROWS, reference=copy.deepcopy(model))
    assert (figures["accuracy"], figures["margin"]) == (0.5, 0.0)
    assert 0 <= figures["plain_accuracy"] <= 1


def test_figures_see_what_training_did_to_both_answers(model):
    before = copy.deepcopy(model)
    prefer.dpo(model, TOKENIZER, ROWS, **SHORT)
    start = prefer.pair_figures(before, TOKENIZER, ROWS, reference=before)
    end = prefer.pair_figures(model, TOKENIZER, ROWS, reference=before, beta=0.1)
    assert end["accuracy"] > 0.5
    assert end["chosen_reward"] == pytest.approx(0.1 * (end["chosen_logp"] - start["chosen_logp"]), abs=1e-4)


def test_kto_learns_from_single_thumbs(model):
    before = copy.deepcopy(model)
    rows = prefer.kto(model, TOKENIZER, pairs.as_thumbs(ROWS), steps=8, batch_size=8, lr=3e-3, warmup=1)
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert rows[-1]["loss"] < 0.499 and all(row["z0"] >= 0 for row in rows)
    assert prefer.pair_figures(model, TOKENIZER, ROWS, reference=before)["margin"] > 0


def test_kto_with_adapter_off_is_kto_with_a_precomputed_reference(model):
    start, thumbs = add_lora(model, 4), pairs.as_thumbs(ROWS)
    both = [
        prefer.kto(copy.deepcopy(start), TOKENIZER, thumbs, reference=reference, **SHORT)
        for reference in ("precomputed", "adapter off")
    ]
    a, b = ([row["loss"] for row in rows] for rows in both)
    assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "sigmoidal"}, "unknown loss 'sigmoidal': choose one of dpo, cdpo"),
        ({"reference": "adapter off"}, "needs a peft model"),
        ({"reference": "frozen"}, "unknown reference 'frozen'"),
        ({"reference": torch.zeros(2, 3)}, r"log-probabilities of 3 pairs, but there are 8"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(model, wrong, message):
    with pytest.raises(UserError, match=message):
        prefer.dpo(model, TOKENIZER, ROWS, **SHORT, **wrong)


def test_kto_needs_a_neighbour_for_its_reference_point(model):
    with pytest.raises(UserError, match="batch_size is 1"):
        prefer.kto(model, TOKENIZER, pairs.as_thumbs(ROWS), steps=1, batch_size=1, lr=1e-3)
