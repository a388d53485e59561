"""Eight bits in blocks: errors stay small, zeros blocks stay zero, scales come back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.methods.blockwise import dequantize_blockwise, double_quantize, quantize_blockwise, restore_scales
from finetune_lab.methods.codebooks import dynamic_code, nearest


def values(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 900), blocksize=st.sampled_from([64, 256]), signed=st.booleans(), seed=st.integers(0, 99))
def test_the_error_is_at_most_half_a_gap_and_half_a_cell(n, blocksize, signed, seed):
    x = values(n, seed)
    x = x if signed else x.square()
    codes, absmax = quantize_blockwise(x, signed, blocksize)
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and len(absmax) == -(-n // blocksize)
    back = dequantize_blockwise(codes, absmax, signed, blocksize)
    limit = dynamic_code(signed).diff().max() / 2 + 2 / 65535
    scale = absmax.repeat_interleave(blocksize)[:n]
    assert ((back - x).abs() <= limit * scale + 1e-7).all()


def test_shapes_are_kept():
    codes, absmax = quantize_blockwise(values(6 * 7 * 50).view(6, 7, 50))
    assert codes.shape == (6, 7, 50) == dequantize_blockwise(codes, absmax).shape


@pytest.mark.parametrize("signed", [True, False])
def test_a_block_of_zeros_comes_back_as_zeros(signed):
    x = torch.zeros(600)
    x[:256] = values(256).abs()
    codes, absmax = quantize_blockwise(x, signed)
    assert (dequantize_blockwise(codes, absmax, signed)[256:] == 0).all() and (codes[256:] == 0).all()


def test_cells_choose_the_nearest_level_for_all_but_two_in_a_thousand_gaussian_values():
    x = values(2**18)
    codes, absmax = quantize_blockwise(x)
    exact = nearest(x.view(-1, 256) / absmax[:, None], dynamic_code()).flatten()
    off = (codes.int() - exact.int()).abs()
    assert 0 < (off > 0).float().mean() < 0.002


def test_a_zero_beside_a_one_does_not_come_back_as_zero():
    """The price of the table: its cells are 3e-5 wide, the lowest levels of the code are finer."""
    x = torch.zeros(256)
    x[0] = 1
    codes, absmax = quantize_blockwise(x)
    assert dequantize_blockwise(codes, absmax)[1] == pytest.approx(2.125e-5)


def test_tiny_blocks_do_not_overflow():
    x = torch.full((256,), 1e-40)
    codes, absmax = quantize_blockwise(x)
    assert dequantize_blockwise(codes, absmax).isfinite().all()


def test_scales_come_back_within_one_percent_of_their_spread_and_take_a_byte_each():
    absmax = 2.5 + 0.4 * values(10_000)
    scales = double_quantize(absmax)
    spread = (absmax - absmax.mean()).abs().max()
    assert (restore_scales(scales) - absmax).abs().max() <= 0.01 * spread
    assert scales.nbytes == 10_000 + 4 * 40 + 4


def test_equal_scales_come_back_exactly():
    assert torch.equal(restore_scales(double_quantize(torch.full((300,), 0.75))), torch.full((300,), 0.75))
