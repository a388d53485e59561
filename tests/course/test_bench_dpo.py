"""The bench of a DPO step compares what it says it compares."""

import pytest
import torch

from finetune_lab.course.bench import dpo, holds

SIZE = {"vocab": 1792, "width": 64, "inner": 96, "layers": 1, "prompt": 24, "answer": 8, "pairs": 2, "rounds": 1,
        "goals": (">= 1.1", ">= 1.1", "<= 0.5")}  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["LoRA", "full"])
def rows(request):
    with dpo.quiet():
        return dpo.compare(SIZE, lora=request.param)


def test_every_row_has_its_own_name(rows):
    assert len({row["name"] for row in rows}) == len(rows)


def test_all_contestants_compute_one_loss_and_one_gradient(rows):
    agreement = [row for row in rows if "relative difference" in row["name"]]
    assert len(agreement) >= 3 and all(row["value"] <= 1e-5 for row in agreement)


def test_policy_and_reference_are_not_the_same_model(tmp_path):
    """Else every loss would be log 2 and agreement would mean little."""
    with dpo.quiet():
        trainer, pairs = dpo.case(SIZE, lora=True, folder=str(tmp_path))
    losses = {name: step().item() for name, step in dpo.contestants(trainer, pairs).items()}
    assert all(abs(loss - 0.6931) > 1e-3 for loss in losses.values())


def test_goals_stand_on_our_own_step_with_a_cheap_reference(rows):
    ratios = {row["name"].split(": ")[0] for row in rows if row.get("goal") and row.get("ratio") is not None}
    assert ratios in ({"LoRA, ours, adapter off", "LoRA, ours, precomputed"}, {"full, ours, precomputed"})


def test_bytes_fall_even_in_a_small_case(rows):
    share = {
        row["name"]: row["ratio"]
        for row in rows
        if "ours, precomputed: share" in row["name"] and row["peer"] == "textbook"
    }
    assert len(share) == 1 and max(share.values()) < 0.6


def test_the_closed_forms_hold():
    with torch.random.fork_rng():
        assert all(holds(row) for row in dpo.closed_form(steps=100))
