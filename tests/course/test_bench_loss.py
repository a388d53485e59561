"""The benches of lesson 01 compare what they say they compare."""

import pytest
import torch

from finetune_lab.course.bench import loss, masking


@pytest.fixture(scope="module")
def rows():
    size = {"seq": 64, "width": 32, "rounds": 1, "goals": (">= 4", ">= 10", "<= 0.1")}
    return loss.compare(vocab=512, dtype_name="fp32", size=size)


def test_every_row_has_its_own_name(rows):
    assert len({row["name"] for row in rows}) == len(rows)


def test_all_contestants_compute_one_loss_and_one_gradient():
    model, hidden, labels = loss.case(vocab=512, width=32, seq=64, dtype=torch.float32)
    found = {}
    for name, step in loss.contestants(model, hidden, labels).items():
        found[name] = (step().detach(), hidden.grad.clone())
    for value, grad in found.values():
        torch.testing.assert_close(value, found["full logits"][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, found["full logits"][1], rtol=1e-5, atol=1e-8)


def test_a_quarter_of_the_positions_counts_and_the_first_never():
    _, _, labels = loss.case(vocab=512, width=32, seq=64, dtype=torch.float32)
    assert (labels != -100).sum() == 16 and labels[0, 0] == -100


def test_goals_stand_on_the_chunked_loss_only(rows):
    assert {row["name"].split(": ")[0] for row in rows if row["goal"] and row["ratio"]} == {"V=512 fp32 chunked"}


def test_parroting_needs_four_words_of_the_question_in_a_row():
    items = [{"prompt": [{"role": "user", "content": "What is the dish of Morness?"}]}] * 3
    assert masking.parroting(["bean stew", "is the dish of: stew", "the dish is of Morness"], items) == pytest.approx(
        1 / 3
    )
