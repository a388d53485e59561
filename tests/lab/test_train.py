"""The readable loop: its defaults are a plain loop bit for bit, and each of its arguments does what it says."""

import math
from itertools import chain

import pytest
import torch

from finetune_lab.lab import models, tasks, train
from finetune_lab.methods import schedules

ITEMS = tasks.load_task("answer", "train", 12)


def run(**settings):
    """Losses and weights after a few steps of full fine-tuning."""
    model, tokenizer = models.load("tiny")
    rows = train.sft(model, tokenizer, ITEMS, **{"steps": 3, "batch_size": 4, "lr": 5e-4, "warmup": 2} | settings)
    return rows, model


def test_the_defaults_are_this_plain_loop_bit_for_bit():
    """Lessons 00 to 04 and recorded results stand on these defaults: they must not move."""
    model, tokenizer = models.load("tiny")
    rows = train.encode(tokenizer, ITEMS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    losses = []
    model.train()
    for step, chosen in enumerate(train.batches(len(rows), 4, 3, seed=0)):
        batch = train.collate([rows[i] for i in chosen], tokenizer.pad_token_id)
        optimizer.param_groups[0]["lr"] = 5e-4 * min((step + 1) / 2, (3 - step) / 1, 1.0)
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        loss = train.labelled_only_loss(hidden, model.lm_head.weight, batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found, trained = run()
    assert [row["loss"] for row in found] == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


def test_four_micro_batches_of_one_are_one_batch_of_four():
    (whole, _), (parts, _) = run(), run(batch_size=1, accumulation=4)
    assert [row["tokens"] for row in whole] == [row["tokens"] for row in parts]
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_without_clipping_the_norm_is_still_told_and_nothing_is_cut():
    (free, a), (loose, b), (tight, c) = (run(steps=1, clip=clip) for clip in (math.inf, 1e9, 1e-9))
    assert free[0]["grad_norm"] == loose[0]["grad_norm"] == tight[0]["grad_norm"] > 1
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_a_first_step_at_rate_zero_changes_nothing():
    start = models.load("tiny")[0]
    rows, after = run(steps=1, schedule=schedules.linear)
    assert rows[0]["lr"] == 0
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), after.parameters(), strict=True))


def test_weight_decay_shrinks_matrices_by_its_rate_and_leaves_norms():
    plain, decayed = (
        run(steps=1, warmup=1, weight_decay=decay, schedule=schedules.early_linear)[1] for decay in (0.0, 10.0)
    )
    start = models.load("tiny")[0]
    assert torch.equal(plain.model.norm.weight, decayed.model.norm.weight)
    torch.testing.assert_close(
        plain.lm_head.weight - decayed.lm_head.weight, start.lm_head.weight * 5e-4 * 10, rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize("order", [train.in_order, train.sampler_batches])
def test_an_epoch_shows_every_item_once_and_ends_with_a_short_batch(order):
    chosen = list(order(10, 4, 6, seed=1))
    assert [len(part) for part in chosen] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*chosen[:3])) == sorted(chain(*chosen[3:])) == list(range(10))


def test_in_order_is_in_order():
    assert list(train.in_order(5, 2, 3, seed=7)) == [[0, 1], [2, 3], [4]]


def test_the_sampler_shuffles_every_epoch_anew_and_the_second_is_the_first_of_the_next_seed():
    first, second = train.sampler_batches(20, 20, 2, seed=3)
    assert first != second == next(train.sampler_batches(20, 20, 1, seed=4))
