"""Planted outliers change the weights and not the model."""

import copy

import pytest
import torch
from torch import nn

from finetune_lab.lab.models import load
from finetune_lab.lab.outliers import plant_outliers


@pytest.fixture(scope="module")
def model():
    return load("tiny")[0]


def largest(model):
    """Largest weight of each down projection, in standard deviations of the first model's."""
    return [m.down_proj.weight.abs().max().item() for m in model.modules() if hasattr(m, "down_proj")]


def test_the_logits_stay_while_the_largest_weights_grow(model):
    other = copy.deepcopy(model)
    assert plant_outliers(other, 20) == model.config.num_hidden_layers
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert all(after > 3 * before for before, after in zip(largest(model), largest(other), strict=True))


def test_a_fused_gate_and_up_projection_is_scaled_in_its_up_half():
    mlp = nn.Module()
    mlp.gate_up_proj, mlp.down_proj = nn.Linear(3, 8, bias=False), nn.Linear(4, 3, bias=False)
    before = mlp.gate_up_proj.weight.detach().clone()
    assert plant_outliers(nn.ModuleList([mlp]), 10) == 1
    changed = (mlp.gate_up_proj.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [4]


def test_a_model_without_gated_mlps_is_left_alone():
    assert plant_outliers(nn.Sequential(nn.Linear(4, 3)), 10) == 0


def test_a_factor_must_be_positive(model):
    with pytest.raises(ValueError, match="factor is 0"):
        plant_outliers(model, 0)
