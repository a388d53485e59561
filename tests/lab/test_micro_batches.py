"""What fp16 keeps of real gradients, by the scale of the loss."""

import pytest

from finetune_lab.lab import tasks, train
from finetune_lab.lab.micro_batches import fp16_shares, gradients
from finetune_lab.lab.models import load


@pytest.fixture(scope="module")
def shares():
    model, tokenizer = load("tiny")
    rows = train.encode(tokenizer, tasks.load_task("answer", "train", 4))
    batch = train.collate(rows, tokenizer.pad_token_id)
    exact = gradients(model, batch)
    return {scale: fp16_shares(model, batch, exact, scale) for scale in (1, 2**10, 2**18)}


@pytest.mark.parametrize("way", ["cast", "backward"])
def test_fp16_loses_real_gradients_and_a_scale_of_1024_saves_nearly_all_of_them(shares, way):
    assert shares[1][f"{way}: zero"] > 0.01 and shares[1][f"{way}: zero"] > 50 * shares[2**10][f"{way}: zero"]
    assert shares[2**10][f"{way}: infinite"] == 0


@pytest.mark.parametrize("way", ["cast", "backward"])
def test_too_large_a_scale_overflows(shares, way):
    assert shares[2**18][f"{way}: infinite"] > 0
