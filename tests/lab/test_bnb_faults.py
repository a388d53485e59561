"""Each fault of bitsandbytes on CPUs is found by its function, and make_safe keeps clear of it.

A CPU without the faulty path cannot show a fault: those tests say so and are skipped; the others run everywhere.
"""

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from finetune_lab.errors import UserError
from finetune_lab.lab import bnb_faults
from finetune_lab.methods.nf4_linear import NF4Linear

needs_avx512 = pytest.mark.skipif(not bnb_faults.has_avx512(), reason="the wrong kernel is the AVX-512 one")
needs_repacking = pytest.mark.skipif(
    not bnb_faults.repacks_in_eval(), reason="weights are repacked in eval mode on CPUs with AVX512-BF16 only"
)


def weight(n_out, n_in):
    """Columns of unlike scale: with block maxima all alike the wrong scale would hardly show."""
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, n_in)


def layer(n_in=64, n_out=32, bias=False):
    made = bnb.nn.Linear4bit(n_in, n_out, bias=bias, quant_type="nf4", compute_dtype=torch.float32)
    made.weight.data = weight(n_out, n_in)
    return made.to("cpu")


@needs_avx512
@pytest.mark.parametrize("n_in", [80, 96, 144, 224, 240, 480])
def test_rows_that_are_a_multiple_of_16_but_not_of_the_block_are_restored_wrongly(n_in):
    assert "wrongly" in bnb_faults.wrong_rows(weight(32, n_in))


@needs_avx512
def test_a_row_shorter_than_the_block_is_restored_wrongly_too():
    assert bnb_faults.wrong_rows(weight(64, 64), blocksize=128)


@pytest.mark.parametrize("n_in", [64, 128, 192])
def test_rows_that_fill_their_blocks_are_restored_rightly(n_in):
    assert bnb_faults.wrong_rows(weight(32, n_in)) is None


@pytest.mark.parametrize("n_in", [80, 240])
def test_our_layer_is_right_where_bitsandbytes_is_wrong(n_in):
    linear = nn.Linear(n_in, 32, bias=False)
    linear.weight.data = weight(32, n_in)
    error = (NF4Linear.from_linear(linear).dequantize() - linear.weight).norm() / linear.weight.norm()
    assert error < 0.12


@needs_repacking
@pytest.mark.parametrize("bias", [False, True])
def test_one_look_in_eval_mode_severs_the_gradient_and_spoils_the_weight(bias):
    one = layer(bias=bias)
    before = bnb.functional.dequantize_4bit(one.weight, one.weight.quant_state)
    assert bnb_faults.repacked(one) is None and bnb_faults.severed(one) is None
    with torch.no_grad():
        one.eval()(torch.randn(1, 64))
    assert "repacked" in bnb_faults.repacked(one) and "autograd" in bnb_faults.severed(one)
    after = bnb.functional.dequantize_4bit(one.weight, one.weight.quant_state)
    assert (after.view_as(before) - before).norm() / before.norm() > 0.5


@needs_repacking
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 33), (72, 32)])
def test_eval_mode_raises_for_some_shapes(n_in, n_out):
    assert "fails in eval mode" in bnb_faults.eval_error(layer(n_in, n_out))


def test_eval_mode_works_for_friendly_shapes():
    assert bnb_faults.eval_error(layer(128, 64)) is None


@pytest.mark.parametrize(("n_in", "n_out"), [(64, 32), (64, 33), (128, 7)])
def test_make_safe_avoids_repacking_errors_and_severed_gradients(n_in, n_out):
    one = bnb_faults.make_safe(layer(n_in, n_out))
    expected = NF4Linear.from_linear(plain(n_out, n_in))(torch.ones(2, n_in))
    assert bnb_faults.eval_error(one) is None
    assert bnb_faults.repacked(one) is None and bnb_faults.severed(one) is None
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(torch.ones(2, n_in)), expected)


def plain(n_out, n_in):
    linear = nn.Linear(n_in, n_out, bias=False)
    linear.weight.data = weight(n_out, n_in)
    return linear


def test_make_safe_reaches_layers_inside_a_model_and_leaves_others_alone():
    model = bnb_faults.make_safe(nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer())))
    assert model[1][0].support_avx512bf16_for_cpu is False
    assert not hasattr(model[0], "support_avx512bf16_for_cpu")


@needs_avx512
def test_make_safe_refuses_rows_that_would_be_restored_wrongly():
    with pytest.raises(UserError, match="80 inputs, no multiple of the block of 64"):
        bnb_faults.make_safe(nn.Sequential(layer(80, 32)))


@needs_repacking
def test_make_safe_comes_too_late_after_a_forward_in_eval_mode():
    model = nn.Sequential(layer()).eval()
    with torch.no_grad():
        model(torch.randn(1, 64))
    with pytest.raises(UserError, match="Load it again"):
        bnb_faults.make_safe(model)


def test_detectors_leave_the_mode_of_the_layer_as_it_was():
    for training in (True, False):
        one = bnb_faults.make_safe(layer()).train(training)
        bnb_faults.severed(one)
        bnb_faults.eval_error(copy.deepcopy(one))
        assert one.training is training


def test_a_zero_in_an_eight_bit_block_comes_back_as_a_small_number():
    assert 0 < bnb_faults.zero_comes_back_as() < 1e-4
