"""The estimator equals live bytes of real steps to the byte, at random small shapes; the tracker equals torch's own."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker

from finetune_lab.course.bench.vram import EXACT, FAMILIES, SIZES, allocator_peak, build, estimated, truth
from finetune_lab.lab.livebytes import LiveBytes
from finetune_lab.methods.memory import Recipe, estimate, from_config

DIALS = {
    "method": st.sampled_from(["full", "lora", "dora"]),
    "rank": st.integers(1, 9),
    "dropout": st.sampled_from([0.0, 0.1]),
    "dtype": st.sampled_from(["bf16", "fp32"]),
    "adapter_dtype": st.sampled_from(["bf16", "fp32"]),
    "batch": st.integers(1, 3),
    "seq": st.integers(2, 40),
    "checkpointing": st.booleans(),
    "attention": st.sampled_from(["sdpa", "eager"]),
    "update": st.sampled_from(["loop", "foreach", "fused"]),
}


@st.composite
def cells(draw):
    """(config, recipe): a small model of a random family and shape, and a random recipe."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(2 if kv == 1 else 1, 3))
    sizes = {
        "hidden_size": heads * 8 * draw(st.integers(1, 3)),
        "intermediate_size": 8 * draw(st.integers(1, 12)),
        "num_key_value_heads": kv,
        "num_attention_heads": heads,
        "head_dim": 8 * draw(st.integers(1, 4)),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(8, 300)),
    }
    recipe = {name: draw(values) for name, values in DIALS.items()}
    if family == "gemma2":
        recipe["attention"] = "eager"
    if family == "qwen2":  # its class takes hidden / heads
        sizes["head_dim"] = None
    if recipe["dtype"] == "fp32":
        recipe["adapter_dtype"] = "fp32"
    return {k: v for k, v in (SIZES | FAMILIES[family] | sizes).items() if v is not None}, Recipe(**recipe)


@settings(deadline=None, max_examples=12, derandomize=True, phases=[Phase.generate])
@given(cells())
def test_estimate_equals_live_bytes_at_random_shapes(cell):
    config, recipe = cell
    true, mine = truth(config, recipe), estimated(from_config(config), recipe)
    assert {key: mine[key] for key in (*EXACT, "peak")} == {key: true[key] for key in (*EXACT, "peak")}


@pytest.mark.parametrize("rest", [True, False])
def test_qlora_with_bitsandbytes_layers_equals_live_bytes(rest):
    config, recipe = SIZES | FAMILIES["qwen2"], Recipe(method="qlora", batch=2, seq=24, kbit_fp32=rest)
    true, mine = truth(config, recipe), estimated(from_config(config), recipe)
    assert {key: mine[key] for key in (*EXACT, "peak")} == {key: true[key] for key in (*EXACT, "peak")}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_untraced_estimate_equals_the_allocators_events(method):
    """Adapters: 8 bytes for each adapted layer are torch's own tensor of the scaling, which no operation returns; at
    this size a generator's state (5,056 bytes) more or less is 0.25 %. The bench's goal is 1 %."""
    config, recipe = SIZES | FAMILIES["llama"], Recipe(method=method, batch=2, seq=64, checkpointing=True)
    mine = estimated(from_config(config), recipe, traced=False)["above"]
    assert allocator_peak(config, recipe) == pytest.approx(mine, rel=5e-3)


def test_live_bytes_equal_those_of_torchs_mem_tracker():
    recipe = Recipe(method="full", batch=2, seq=32)
    ids = torch.randint(3, 700, (2, 32))

    def step(model):
        model(input_ids=ids, labels=ids).loss.backward()

    with LiveBytes() as live:
        model = build(SIZES | FAMILIES["llama tied"], recipe)
        live.watch(model.parameters())
        live.watch([ids])
        before = live.live
        live.mark()
        step(model)
        mine = live.mark() - before
    model = build(SIZES | FAMILIES["llama tied"], recipe)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        start = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
        step(model)
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert mine == peak - start


def test_holding_the_models_output_during_backward_costs_one_copy_of_the_logits():
    config, recipe = SIZES | FAMILIES["llama"], Recipe(method="full", batch=2, seq=32)
    model, ids = build(config, recipe), torch.randint(3, 700, (2, 32))
    with LiveBytes() as live:
        live.watch(model.parameters())
        before = live.live
        out = model(input_ids=ids, labels=ids)
        live.mark()
        out.loss.backward()
        held = live.mark() - before
    ledger = estimate(from_config(config), recipe, device="cpu", traced=True)
    mine = ledger.totals["backward of the head"] - ledger.totals["after loading"] - 16 * 2 * 32
    assert held - mine == 2 * 2 * 32 * config["vocab_size"]


def test_phi3s_joined_heads_need_no_copy_before_the_scores():
    """Its rotation ends in a cat, whose heads lie one after another: a copy here would be 2.5 % too much."""
    sizes = {"hidden_size": 144, "intermediate_size": 72, "num_attention_heads": 6, "vocab_size": 286}
    config = SIZES | FAMILIES["phi3"] | sizes | {"num_hidden_layers": 2}
    del config["head_dim"]
    recipe = Recipe(rank=3, dtype="fp32", update="foreach", batch=3, seq=28, checkpointing=True, attention="eager")
    assert estimated(from_config(config), recipe)["peak"] == truth(config, recipe)["peak"]


def test_no_step_is_needed_for_a_large_model():
    """Layers are equal: 40 of them lie on the straight line through the real 4 and 6."""
    config, recipe = SIZES | FAMILIES["llama"], Recipe(method="lora", batch=2, seq=48)

    def real(layers):
        return truth(config | {"num_hidden_layers": layers}, recipe)["peak"]

    four, six = real(4), real(6)
    mine = estimated(from_config(config | {"num_hidden_layers": 40}), recipe)["peak"]
    assert mine == four + 18 * (six - four)
