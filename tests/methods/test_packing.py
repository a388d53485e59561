"""Padding changes nothing that is read, and packing lets no sample see another: shown on a real Llama."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.methods.loss import sft_loss
from finetune_lab.methods.packing import (
    best_fit,
    block_diagonal_mask,
    document_attention,
    pack,
    pad_rows,
    positions_from_mask,
    token_efficiency,
)

ROWS = [[5, 6, 7, 8, 9], [11, 12, 13], [14, 15, 16, 17]]
PAD = 0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def alone(model, row):
    return model(input_ids=torch.tensor([row])).logits[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_real_tokens_logits_unchanged(model, side):
    ids, mask = pad_rows(ROWS, PAD, side)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions_from_mask(mask)).logits
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(logits[i][mask[i].bool()], alone(model, row), rtol=0, atol=1e-5)


def test_without_the_mask_left_padding_changes_logits_and_right_padding_does_not(model):
    for side, changed in (("left", True), ("right", False)):
        ids, mask = pad_rows(ROWS, PAD, side)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        gap = (logits[1][mask[1].bool()] - alone(model, ROWS[1])).abs().max()
        assert (gap > 1e-3) == changed


def test_the_mask_knows_padding_from_a_real_token_with_the_same_id():
    ids, mask = pad_rows([[3, PAD], [3]], PAD)
    assert ids.tolist() == [[3, PAD], [3, PAD]] and mask.tolist() == [[1, 1], [1, 0]]


def test_an_unknown_side_is_named():
    with pytest.raises(ValueError, match="side is 'middle'"):
        pad_rows(ROWS, PAD, "middle")


def test_positions_count_real_tokens_only():
    assert positions_from_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_pack_restarts_positions_and_drops_first_labels():
    ids, labels, positions = pack([[5, 6], [7, 8, 9]], [[5, 6], [-100, 8, 9]])
    assert ids.tolist() == [[5, 6, 7, 8, 9]]
    assert labels.tolist() == [[-100, 6, -100, 8, 9]]
    assert positions.tolist() == [[0, 1, 0, 1, 2]]


def test_block_diagonal_mask_is_causal_inside_a_sample_and_empty_outside():
    mask = block_diagonal_mask(torch.tensor([[0, 1, 0, 1, 2]]))[0, 0].int()
    assert mask.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("how", ["block-diagonal mask", "position ids alone"])
def test_packed_samples_have_the_logits_they_have_alone(model, how):
    ids, _, positions = pack(ROWS, ROWS)
    # transformers reads samples out of position ids only when there is neither a mask nor a cache
    extra = {"attention_mask": block_diagonal_mask(positions)} if how == "block-diagonal mask" else {"use_cache": False}
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, **extra).logits[0]
    torch.testing.assert_close(logits, torch.cat([alone(model, row) for row in ROWS]), rtol=0, atol=1e-5)


def test_a_mask_of_ones_contaminates_packed_samples(model):
    ids, _, positions = pack(ROWS, ROWS)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0]
    apart = torch.cat([alone(model, row) for row in ROWS])
    assert (logits - apart)[: len(ROWS[0])].abs().max() < 1e-5  # the first sample has nobody in front of it
    assert (logits - apart)[len(ROWS[0]) :].abs().max() > 1e-3


def test_a_cache_switches_off_transformers_packing_by_position_ids(model):
    ids, _, positions = pack(ROWS, ROWS)
    with torch.no_grad():
        cached, free = (model(input_ids=ids, position_ids=positions, use_cache=c).logits for c in (True, False))
    assert (cached - free).abs().max() > 1e-3  # so: train and measure packed rows with use_cache=False


def test_the_packed_loss_equals_the_padded_loss(model):
    ids, labels, positions = pack(ROWS, ROWS)
    padded, mask = pad_rows(ROWS, PAD)
    padded_labels, _ = pad_rows(ROWS, -100)
    with torch.no_grad():
        packed = sft_loss(model(input_ids=ids, position_ids=positions, use_cache=False).logits, labels)
        unpacked = sft_loss(model(input_ids=padded, attention_mask=mask).logits, padded_labels)
    torch.testing.assert_close(packed, unpacked, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=80))
def test_best_fit_keeps_every_sample_whole_and_once(lengths):
    rows = best_fit(lengths, 60)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 60 for row in rows)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80))
def test_best_fit_places_each_sample_where_the_least_room_is_left(lengths):
    room, slow = [], []  # the same rule by looking at every row: as many rows, filled as far
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            room.remove(min(fitting))
        room.append(min(fitting, default=60) - length)
    slow = sorted(60 - r for r in room)
    assert sorted(sum(lengths[i] for i in row) for row in best_fit(lengths, 60)) == slow


def test_best_fit_fills_999_of_1000_token_places():
    draw = random.Random(0)
    lengths = [min(1024, max(1, round(draw.lognormvariate(math.log(200) - 0.32, 0.8)))) for _ in range(4000)]
    assert token_efficiency(lengths, best_fit(lengths, 1024), 1024) >= 0.999


def test_token_efficiency_counts_padding_to_the_longest_or_to_the_width():
    assert token_efficiency([2, 4, 3], [[0, 1], [2]]) == 9 / (8 + 3)
    assert token_efficiency([2, 4, 3], [[0, 1], [2]], width=6) == 9 / 12


@pytest.mark.parametrize("length", [0, 11])
def test_best_fit_names_a_sample_that_fits_into_no_row(length):
    with pytest.raises(ValueError, match=f"sample 1 with {length} tokens: expected 1 to 10"):
        best_fit([5, length], 10)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([(4, 4), (6, 2)]), st.integers(1, 2))
def test_document_attention_is_attention_under_the_block_diagonal_mask(lengths, heads, batch):
    torch.manual_seed(0)
    total = sum(lengths)
    rows = [lengths, lengths[::-1]][:batch]  # rows of a batch hold different samples
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    query, key, value = (torch.randn(batch, n, total, 8, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    dense = scaled_dot_product_attention(
        query, key, value, attn_mask=block_diagonal_mask(positions), scale=0.3, enable_gqa=True
    )
    ours = document_attention(query, key, value, positions, scale=0.3)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(dense)
    for mine, theirs in zip(
        *(torch.autograd.grad(out, (query, key, value), upstream) for out in (ours, dense)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
