"""A second oracle: Liger's chunked preference losses, recorded (make_liger_vectors.py), from hidden states to gradients."""

import json
from pathlib import Path

import pytest
import torch

from finetune_lab.methods import preference as p

RECORDED = json.loads(Path(__file__).with_name("liger_preference.json").read_text())
INPUTS = {name: torch.tensor(value) for name, value in RECORDED["inputs"].items()}


def logps(states, weight, average=False):
    """(2, pairs) log-probabilities; Liger's targets are shifted already, ours are not: one column more in front."""
    ahead = torch.cat([INPUTS["targets"].new_full((len(states), 1), p.IGNORE_INDEX), INPUTS["targets"]], 1)
    padded = torch.cat([states, states[:, -1:]], 1)
    return p.hidden_logps(padded, weight, ahead, average).view(2, -1)


def kto(policy, reference):
    loss = p.kto_loss(policy.flatten(), reference.flatten(), torch.tensor(RECORDED["thumbs"]), RECORDED["z0"], 0.1)
    return loss[0]


def orpo(states, weight):
    sums, means = logps(states, weight), logps(states, weight, average=True)
    chosen_tokens = (INPUTS["targets"][: len(states) // 2] != p.IGNORE_INDEX).sum()
    return p.orpo_loss(*means, -sums[0].sum() / chosen_tokens, 0.1)[0]


REFERENCE = logps(INPUTS["reference_states"], INPUTS["reference_weight"])
NOTHING = torch.zeros(2, REFERENCE.shape[1])
OURS = {
    "dpo": lambda s, w: p.dpo_loss(*logps(s, w), *REFERENCE, 0.1)[0],
    "hinge": lambda s, w: p.hinge_loss(*logps(s, w), *REFERENCE, 0.1)[0],
    "robust": lambda s, w: p.robust_dpo_loss(*logps(s, w), *REFERENCE, 0.1, 0.2)[0],
    "cdpo": lambda s, w: p.cdpo_loss(*logps(s, w), *NOTHING, 0.1, 0.2)[0],
    "simpo": lambda s, w: p.simpo_loss(*logps(s, w, average=True), 2.0, 0.5)[0],
    "orpo": orpo,
    "kto": lambda s, w: kto(logps(s, w), REFERENCE),
}


@pytest.mark.parametrize("name", RECORDED["losses"])
def test_loss_and_gradients_equal_ligers(name):
    states, weight = (INPUTS[key].clone().requires_grad_() for key in ("states", "weight"))
    loss = OURS[name](states, weight)
    loss.backward()
    wanted = RECORDED["losses"][name]
    assert loss.item() == pytest.approx(wanted["loss"], abs=1e-6, rel=1e-6)
    torch.testing.assert_close(states.grad, torch.tensor(wanted["states"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad, torch.tensor(wanted["weight"]), rtol=1e-5, atol=1e-6)
