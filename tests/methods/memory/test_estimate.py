"""The ledger adds up, moments are where they should be, and everything beyond one plain step moves the right lines."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.methods import counts
from finetune_lab.methods.memory import Recipe, estimate, from_config
from finetune_lab.methods.memory.estimate import _step
from finetune_lab.methods.memory.ledger import CATEGORIES

LLAMA_1B = from_config(
    {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
     "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True}
)  # fmt: skip
SMALL = replace(
    LLAMA_1B, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, rotary_dim=16, intermediate=96, vocab=50
)
FULL = Recipe(method="full")

recipes = st.builds(
    Recipe,
    method=st.sampled_from(["full", "lora", "dora", "qlora"]),
    objective=st.sampled_from(["sft", "dpo", "reward", "ppo", "grpo"]),
    logits=st.sampled_from(["full", "labelled", "chunked"]),
    labelled=st.floats(0, 1),
    reference=st.sampled_from(["none", "separate", "precomputed"]),
    sharding=st.sampled_from(["ddp", "zero1", "zero2", "zero3", "fsdp"]),
    ranks=st.integers(1, 8),
    offload=st.sampled_from(["none", "optimizer", "all"]),
    optimizer=st.sampled_from(["adamw", "paged-adamw-8bit", "adafactor", "galore-adamw", "sgd"]),
    batch=st.integers(1, 3),
    seq=st.just(300),
    checkpointing=st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(recipes)
def test_categories_sum_to_the_peak_and_the_peak_is_a_moment(recipe):
    ledger = estimate(SMALL, recipe)
    assert sum(ledger.categories().values()) == ledger.peak == ledger.totals[ledger.peak_moment]
    assert set(ledger.categories()) <= set(CATEGORIES)
    assert all(size >= 0 for _, alive in ledger.timeline() for size in alive.values())
    assert ledger.total_on_device > ledger.peak


def per_layer(recipe):
    """Bytes a token and layer that are saved for backward."""

    def saved(layers):
        found = estimate(replace(LLAMA_1B, layers=layers), recipe)
        return dict(found.moments)["end of forward"]["activations"]

    return (saved(3) - saved(2)) / (recipe.batch * recipe.seq)


def test_saved_activations_have_the_closed_form():
    a, r = LLAMA_1B, 16
    h, i, q, kv = a.hidden, a.intermediate, a.query_width, a.kv_width
    full = 16 * h + 8 + 4 * q + 4 * kv + 4 * a.heads + 8 * i
    assert per_layer(FULL) == full
    assert per_layer(Recipe(adapter_dtype="bf16")) == full - 4 * h + 14 * r
    assert per_layer(Recipe()) == full + 12 * h + 2 * i + 4 * q + 28 * r
    assert per_layer(Recipe(method="full", checkpointing=True)) == 2 * h


def test_lora_holds_more_activations_than_full_fine_tuning_and_dora_far_more():
    full, lora, dora = (per_layer(Recipe(method=m, seq=2048)) for m in ("full", "lora", "dora"))
    assert full < lora < dora


def test_checkpointing_saves_nothing_where_the_peak_is_elsewhere():
    assert estimate(LLAMA_1B, FULL).peak == estimate(LLAMA_1B, replace(FULL, checkpointing=True)).peak
    assert estimate(LLAMA_1B, replace(FULL, update="foreach")).peak_moment == "optimizer step"


def test_sixteen_bytes_are_mixed_precision_with_master_weights():
    ledger = estimate(LLAMA_1B, replace(FULL, master_weights=True))
    stays = sum(ledger.total(c) for c in ("weights", "gradients", "master weights", "optimizer"))
    steps = 4 * (2 + 9 * 16)  # torch's step counters: one for each tensor
    assert stays - steps == counts.full_fine_tuning_bytes(LLAMA_1B.parameters(), "mixed precision with fp32 master")


@pytest.mark.parametrize(("sharding", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("fsdp", 3)])
def test_ranks_divide_what_the_drills_say(sharding, stage):
    ledger = estimate(LLAMA_1B, replace(FULL, master_weights=True, ranks=4, sharding=sharding))
    kept = sum(ledger.total(c) for c in ("weights", "gradients", "master weights", "optimizer"))
    expected = counts.zero_bytes_per_rank(LLAMA_1B.parameters(), 4, stage)
    assert kept == pytest.approx(expected, rel=1e-6)


def test_ddp_copies_every_gradient():
    alone, many = estimate(LLAMA_1B, FULL), estimate(LLAMA_1B, replace(FULL, ranks=2, sharding="ddp"))
    assert many.total("gradients") == 2 * alone.total("gradients")


def test_offloaded_and_paged_states_are_the_hosts():
    for recipe in (replace(FULL, offload="optimizer"), replace(FULL, optimizer="paged-adamw")):
        ledger = estimate(LLAMA_1B, recipe)
        assert "optimizer" not in ledger.categories()
        assert {line.category for line in ledger.host} == {"optimizer"}


def test_a_pair_costs_two_sequences_and_a_precomputed_reference_nothing():
    plain = Recipe(objective="dpo", reference="precomputed")
    assert estimate(LLAMA_1B, plain).peak == estimate(LLAMA_1B, Recipe(batch=2)).peak
    separate = estimate(LLAMA_1B, replace(plain, reference="separate"))
    off = estimate(LLAMA_1B, replace(plain, reference="adapter-off"))
    assert separate.peak - off.peak == estimate(LLAMA_1B, plain).total("weights")


def test_a_reward_model_has_no_logits():
    assert "logits" not in estimate(LLAMA_1B, Recipe(objective="reward")).categories()


def test_ppo_holds_four_models_and_grpo_a_cache():
    ppo = estimate(LLAMA_1B, Recipe(objective="ppo", reference="separate"))
    assert ppo.total("reference model") == ppo.total("weights") < ppo.total("other models") / 2
    cache = dict(estimate(LLAMA_1B, Recipe(objective="grpo", generations=4)).moments)["rollout"]["KV cache"]
    assert cache == counts.kv_cache_bytes(4 * 512, LLAMA_1B.kv_width, 16)


def test_logits_at_labelled_positions_cost_their_share():
    full, quarter = (estimate(LLAMA_1B, r) for r in (Recipe(), Recipe(logits="labelled", labelled=0.25)))
    chunked = estimate(LLAMA_1B, Recipe(logits="chunked", labelled=0.25))
    assert quarter.total("logits") == pytest.approx(full.total("logits") / 4, rel=0.01)
    assert chunked.total("logits") < quarter.total("logits") / 10


def test_an_estimate_takes_milliseconds():
    _step.cache_clear()
    start = time.process_time()
    estimate(replace(LLAMA_1B, layers=80), Recipe(method="dora", checkpointing=True))
    assert time.process_time() - start < 0.25
