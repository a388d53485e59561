"""Claims about the EWC penalty, from the paper's own properties."""

import pytest
import torch
from torch import nn

from finetune_lab.methods.forgetting import ewc_penalty, snapshot


def test_penalty_is_half_lambda_times_fisher_weighted_square():
    old, fisher = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 0.5])}
    new = {"w": torch.tensor([2.0, 0.0])}
    assert ewc_penalty(new, old, fisher, 0.4).item() == pytest.approx(0.4 / 2 * (3 * 1 + 0.5 * 4))


def test_gradient_is_lambda_fisher_times_distance_and_reaches_only_the_parameters():
    w = torch.randn(5, 3, requires_grad=True)
    old, fisher = torch.randn(5, 3, requires_grad=True), torch.rand(5, 3, requires_grad=True)
    ewc_penalty({"w": w}, {"w": old}, {"w": fisher}, 7.0).backward()
    assert torch.allclose(w.grad, 7 * fisher * (w - old))
    assert old.grad is None and fisher.grad is None


def test_new_task_plus_penalty_finds_the_optimum_of_both_tasks_when_the_old_one_is_quadratic():
    """Why the penalty works: with the exact diagonal curvature it replaces the old task (paper, section 2)."""
    generator = torch.Generator().manual_seed(0)
    curvature_old, curvature_new = (torch.rand(6, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    best_old, best_new = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    joint = (curvature_old * best_old + curvature_new * best_new) / (curvature_old + curvature_new)
    w = best_old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=50, tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        penalty = ewc_penalty({"w": w}, {"w": best_old}, {"w": curvature_old}, 1.0)
        loss = (curvature_new * (w - best_new) ** 2).sum() / 2 + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(w, joint, atol=1e-4)


def test_snapshot_stays_when_the_model_moves_and_leaves_frozen_parameters_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    before = snapshot(model)
    assert set(before) == {"weight"}
    old = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    assert torch.equal(before["weight"], old)
    ones = {"weight": torch.ones(2, 3)}
    assert ewc_penalty(dict(model.named_parameters()), before, ones, 2.0).item() == pytest.approx(6, rel=1e-5)


def test_a_missing_name_is_named():
    with pytest.raises(ValueError, match="'w'"):
        ewc_penalty({}, {"w": torch.ones(2)}, {"w": torch.ones(2)}, 1.0)
