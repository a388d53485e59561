"""NEFTune: uniform noise of the right size, in training only, and nothing left behind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from finetune_lab.lab import models
from finetune_lab.methods.neftune import neftune, neftune_noise
from finetune_lab.methods.scalars import neftune_bound


def embedding(width=8, seed=0):
    torch.manual_seed(seed)
    return nn.Embedding(31, width)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70)),
    alpha=st.sampled_from([0.1, 5.0, 15]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_noise_stays_inside_the_bound_and_keeps_shape_and_dtype(shape, alpha, dtype):
    noise = neftune_noise(torch.ones(shape, dtype=dtype), alpha)
    assert noise.shape == shape and noise.dtype == dtype
    slack = 1.01 if dtype is torch.bfloat16 else 1.000001  # rounding may step over the bound
    assert noise.abs().max() <= neftune_bound(alpha, *shape[1:]) * slack


def test_standard_deviation_is_alpha_over_root_of_three_l_d():
    noise = neftune_noise(torch.empty(1, 512, 4096), alpha=5)
    assert noise.std().item() == pytest.approx(5 / math.sqrt(3 * 512 * 4096), rel=2e-3)  # 0.00199
    assert noise.mean().abs() < 1e-5


@pytest.mark.parametrize(("length", "width"), [(16, 192), (512, 1024)])
def test_a_sequences_noise_has_the_size_alpha_over_root_three_however_long_or_wide(length, width):
    noise = neftune_noise(torch.empty(8, length, width), alpha=5)
    assert noise.flatten(1).norm(dim=1).mean().item() == pytest.approx(2.887, abs=0.02)


def test_gaussians_of_common_notes_are_1_7_and_66_times_too_large():
    """randn * alpha / sqrt(L d), and a normal whose VARIANCE is alpha^2 / sqrt(L d)."""
    size = neftune_noise(torch.empty(1, 512, 4096), alpha=5).std().item()
    as_code = (torch.randn(512, 4096) * 5 / math.sqrt(512 * 4096)).std().item()
    as_formula = (torch.randn(512, 4096) * math.sqrt(25 / math.sqrt(512 * 4096))).std().item()
    assert as_code / size == pytest.approx(math.sqrt(3), rel=5e-3)
    assert as_formula / size == pytest.approx(65.9, rel=5e-3)


@pytest.mark.parametrize("alpha", [5, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_transformers_own_noise_bit_for_bit(alpha, dtype):
    ids = torch.randint(31, (3, 7))
    theirs = embedding().to(dtype)
    theirs.neftune_noise_alpha = alpha
    theirs.register_forward_hook(neftune_post_forward_hook)
    ours = embedding().to(dtype)
    with neftune(ours, alpha):
        torch.manual_seed(1)
        mine = ours(ids)
    torch.manual_seed(1)
    assert torch.equal(mine, theirs(ids)) and not torch.equal(mine, ours(ids))


def test_eval_mode_sees_no_noise_and_draws_no_random_number():
    table, ids = embedding().eval(), torch.arange(5)[None]
    state = torch.get_rng_state()
    with neftune(table, 15):
        assert torch.equal(table(ids), table.weight[ids])
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_left_after_the_block_even_after_an_error():
    table, ids = embedding(), torch.arange(5)[None]
    with pytest.raises(KeyError), neftune(table, 15):
        raise KeyError
    assert torch.equal(table(ids), table.weight[ids])


def test_weights_stay_and_the_tied_head_is_still_tied():
    model, _ = models.load("tiny")
    table = model.get_input_embeddings()
    before = table.weight.detach().clone()
    with neftune(table, 15):
        model.train()
        model(torch.arange(5)[None])
        assert model.get_input_embeddings().weight is model.lm_head.weight  # a wrapper would hide .weight
    assert torch.equal(table.weight, before)


def test_the_noise_does_not_stop_the_gradient_of_the_table():
    table = embedding()
    with neftune(table, 5):
        table(torch.tensor([[3, 3, 4]])).sum().backward()
    assert table.weight.grad[3].eq(2).all() and table.weight.grad[4].eq(1).all() and table.weight.grad.sum() == 24


def test_padding_lowers_the_noise_of_a_short_row():
    alone = neftune_noise(torch.empty(1, 16, 512), 5).std()
    padded = neftune_noise(torch.empty(1, 64, 512), 5)[:, :16].std()
    assert (alone / padded).item() == pytest.approx(2, rel=0.03)


def test_a_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha is -1"), neftune(embedding(), -1):
        pass
