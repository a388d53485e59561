"""DPO's bytes against a real small step written in torch: policy and reference run chosen and rejected in one batch."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from finetune_lab.course.bench.vram import FAMILIES, SIZES
from finetune_lab.lab.livebytes import step_bytes
from finetune_lab.lab.real_steps import build, make_optimizer
from finetune_lab.methods.memory import Recipe, estimate, from_config

CONFIG = SIZES | FAMILIES["llama"] | {"vocab_size": 3000}


def logps(model, ids):
    logits = model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return -losses.view(len(ids), -1).sum(1)


def dpo_step_bytes(recipe):
    """Live bytes of the second step of DPO (2305.18290, equation 7) with the reference of the recipe."""
    model = build(CONFIG, recipe)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], recipe)
    pairs = torch.randint(3, 700, (2 * recipe.batch, recipe.seq))
    known = torch.zeros(2 * recipe.batch)
    if recipe.reference == "separate":
        model.reference = build(CONFIG, Recipe(method="full")).requires_grad_(False)

    def loss():
        policy, reference = logps(model, pairs), known
        if recipe.reference != "precomputed":
            off = model.disable_adapter() if recipe.reference == "adapter-off" else contextlib.nullcontext()
            with torch.no_grad(), off:
                reference = logps(getattr(model, "reference", model), pairs)
        chosen, rejected = (policy - reference).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return step_bytes(model, optimizer, pairs, pairs.clone(), loss)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("reference", ["precomputed", "adapter-off", "separate"])
def test_dpos_peak_is_never_too_low_and_at_most_two_percent_too_high(reference, checkpointing):
    """Too high by what supervised loss has and DPO's has not: the last position of each sequence (1 of 64 here) and the
    last hidden state, still a local of the model's forward. Measured: 0.6 to 1.4 %."""
    recipe = Recipe(batch=2, seq=64, objective="dpo", reference=reference, checkpointing=checkpointing)
    ledger = estimate(from_config(CONFIG), recipe, device="cpu", traced=True)
    true = dpo_step_bytes(recipe)
    assert true["peak"] <= ledger.peak <= 1.02 * true["peak"]


def test_a_separate_reference_costs_its_weights_and_nothing_else():
    cost = {}
    for reference in ("adapter-off", "separate"):
        recipe = Recipe(batch=2, seq=64, objective="dpo", reference=reference)
        cost[reference] = dpo_step_bytes(recipe)["peak"]
    ledger = estimate(from_config(CONFIG), Recipe(objective="dpo", reference="separate"))
    assert cost["separate"] - cost["adapter-off"] == ledger.total("reference model")
