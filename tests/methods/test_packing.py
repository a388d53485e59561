"""Padding changes nothing that is read, and packing lets no sample see another: shown on a real Llama."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.methods.loss import sft_loss
from finetune_lab.methods.packing import block_diagonal_mask, pack, pad_rows, positions_from_mask

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
