"""One forward pass says what greedy decoding would write."""

import copy

import pytest
import torch

from finetune_lab.lab import forced, generate, tasks, train
from finetune_lab.lab.models import load


@pytest.fixture(scope="module")
def half_taught():
    """A model that answers some questions right and some wrong: fourteen short steps."""
    model, tokenizer = load("tiny", seed=0)
    train.sft(model, tokenizer, tasks.load_task("answer", "train", 200), steps=14, batch_size=16, lr=1e-3)
    return model, tokenizer


def test_exact_match_equals_that_of_the_generated_answers(half_taught):
    model, tokenizer = half_taught
    items = tasks.load_task("answer", "test", 40)
    said = generate.answer(model, tokenizer, [item["prompt"] for item in items], max_new_tokens=24)
    generated = tasks.score("answer", said, items)["exact_match"]
    assert 0.1 < generated < 0.95
    assert forced.scores(model, tokenizer, items)["exact_match"] == pytest.approx(generated)


def test_the_loss_is_that_of_all_answer_tokens_whatever_the_batch(half_taught):
    model, tokenizer = half_taught
    items = tasks.load_task("math", "test", 9)
    together, apart = (forced.scores(model, tokenizer, items, batch_size=n) for n in (64, 2))
    assert together["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    assert together["exact_match"] == apart["exact_match"]


def test_the_model_keeps_its_mode(half_taught):
    model, tokenizer = half_taught
    model.train()
    forced.scores(model, tokenizer, tasks.load_task("answer", "test", 2))
    assert model.training
    model.eval()


def test_weights_taken_and_put_back_are_the_same_model(half_taught):
    model, _ = half_taught
    kept = forced.weights_of(model)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(forced.put_weights(other, kept)(ids).logits, model(ids).logits)


def test_weights_are_copies(half_taught):
    model, _ = half_taught
    name, weight = next(iter(forced.weights_of(model).items()))
    weight.zero_()
    assert dict(model.named_parameters())[name].any()
