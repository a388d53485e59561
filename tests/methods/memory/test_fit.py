"""The solver: what it says fits, fits, and one more does not; levers are judged at the peak."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_lab.methods.memory import Recipe, estimate, fit, from_config
from finetune_lab.methods.memory.presets import PRESETS

LLAMA = from_config(PRESETS["llama-3.1-8b"], "llama-3.1-8b")
SMALL = from_config(PRESETS["smollm2-135m"], "smollm2-135m")
QLORA = Recipe(method="qlora", seq=1024, checkpointing=True)


@given(st.integers(0, 3000), st.integers(1, 2000))
def test_the_largest_number_is_found(truth, limit):
    assert fit.largest(lambda n: n <= truth, limit) == min(truth, limit)


@pytest.mark.parametrize("gb", [12, 16, 24, 80])
def test_the_largest_batch_fits_and_one_more_does_not(gb):
    batch = fit.largest_batch(LLAMA, QLORA, gb * 10**9)
    assert not fit.fits(LLAMA, replace(QLORA, batch=batch + 1), gb * 10**9)
    assert batch == 0 or fit.fits(LLAMA, replace(QLORA, batch=batch), gb * 10**9)


@pytest.mark.parametrize("gb", [12, 16, 24])
def test_the_longest_sequence_fits_and_64_tokens_more_do_not(gb):
    seq = fit.largest_seq(LLAMA, QLORA, gb * 10**9)
    assert seq % 64 == 0 and seq > 0
    assert fit.fits(LLAMA, replace(QLORA, seq=seq), gb * 10**9)
    assert not fit.fits(LLAMA, replace(QLORA, seq=seq + 64), gb * 10**9)


def test_the_sequence_ends_where_the_models_positions_end():
    short = replace(SMALL, max_positions=512)
    assert fit.largest_seq(short, Recipe(), 10**12) == 512


def test_more_memory_never_means_less():
    batches = [fit.largest_batch(LLAMA, QLORA, gb * 10**9) for gb in (8, 16, 24, 48, 80)]
    assert batches == sorted(batches) and batches[-1] > 1


def test_the_models_that_fit_are_listed_with_what_they_need_largest_first():
    found = fit.models_that_fit(QLORA, 24 * 10**9)
    assert [row[1] for row in found] == sorted((row[1] for row in found), reverse=True)
    for name, _, need in found:
        assert need == estimate(from_config(PRESETS[name]), QLORA).total_on_device <= 24 * 10**9
    assert {name for name, *_ in found} >= {"llama-3.1-8b", "smollm2-135m"}
    assert "llama-3.1-70b" not in {name for name, *_ in found}


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_a_levers_saving_is_the_difference_of_two_estimates(method):
    recipe = Recipe(method=method, seq=1024, batch=2, dropout=0.05 if method != "full" else 0.0)
    before = estimate(LLAMA, recipe).total_on_device
    found = fit.savings(LLAMA, recipe)
    assert found
    for saving in found:
        assert saving.saves == before - estimate(LLAMA, replace(recipe, **saving.change)).total_on_device
    assert [saving.saves for saving in found] == sorted((saving.saves for saving in found), reverse=True)


def test_checkpointing_saves_nothing_when_the_peak_is_the_optimizer_step_and_says_so():
    recipe = Recipe(method="full", seq=128, update="foreach")
    ledger = estimate(LLAMA, recipe)
    assert ledger.peak_moment == "optimizer step"
    lever = next(saving for saving in fit.savings(LLAMA, recipe) if saving.lever == "checkpointing")
    assert lever.saves == 0
    assert "the peak is the optimizer step" in lever.why and "activations" in lever.why


def test_checkpointing_takes_activations_away_when_they_make_the_peak():
    recipe = Recipe(method="lora", seq=4096)
    lever = next(saving for saving in fit.savings(LLAMA, recipe) if saving.lever == "checkpointing")
    assert lever.saves > 5e9 and "less activations" in lever.why


def test_a_lever_that_is_pulled_already_is_not_offered():
    names = {saving.lever for saving in fit.savings(LLAMA, replace(QLORA, optimizer="adamw-8bit"))}
    assert not names & {"checkpointing", "8-bit Adam", "LoRA instead of full fine-tuning", "sdpa attention"}


def test_no_lever_breaks_a_recipe_that_is_allowed():
    for objective in ("sft", "dpo", "reward", "ppo", "grpo"):
        assert fit.savings(SMALL, Recipe(objective=objective, seq=512))
