"""Packed bytes, scales and restored values are those of bitsandbytes on the CPU, bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

from finetune_lab.methods.codebooks import dynamic_code, fp4_code, nf4_code
from finetune_lab.methods.nf4 import dequantize, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# full blocks; a last block that is not full; odd numbers of values; rows shorter than a block; less than a block in all
SHAPES = [(64, 128), (32, 192), (33, 97), (127,), (65,), (1, 1), (2, 31), (7, 9, 11), (5, 80), (64, 64), (3, 240)]


def weight(shape, dtype, seed=0):
    """Columns of unlike scale, so that neighbouring blocks have unlike maxima; one row of zeros."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w = w * torch.logspace(-2, 0, shape[-1])
    w[-1] = w[-1] if w.dim() == 1 else 0
    return w.to(dtype)


def restored_by_bitsandbytes(packed, state):
    """bitsandbytes' own Python form of the kernel: its AVX-512 kernel is wrong where rows do not fill blocks (fault 1)."""
    with torch.compiler.set_stance("force_eager"):
        absmax = state.absmax
        if state.nested:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
        flat = (state.shape.numel(), 1)
        out = _dequantize_4bit_compute(packed.flatten(), absmax, state.code, state.blocksize, flat, state.dtype)
        return out.view(state.shape)


def test_code_books_equal_bitsandbytes_tables_to_the_bit():
    assert torch.equal(nf4_code(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(fp4_code(), bnb.get_4bit_type("fp4", device="cpu"))
    for signed in (True, False):
        assert torch.equal(dynamic_code(signed), bnb.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_packed_bytes_scales_and_restored_values_are_bitsandbytes(dtype, shape, blocksize, quant_type):
    w = weight(shape, dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
    q = quantize(w, state.code, blocksize)
    assert torch.equal(q.packed, packed.flatten())
    assert torch.equal(q.absmax, state.absmax)
    ours = dequantize(q)
    assert ours.dtype == dtype and torch.equal(ours, restored_by_bitsandbytes(packed, state))
    if shape[-1] % blocksize == 0:  # where its kernel is right, it too
        assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 192), (33, 97), (256, 64), (70,)])
def test_double_quantised_scales_and_what_comes_back_are_bitsandbytes(dtype, shape):
    w = weight(shape, dtype, seed=1)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    q = quantize(w, double_quant=True)
    assert torch.equal(q.packed, packed.flatten())
    assert torch.equal(q.absmax.codes, state.absmax)
    assert torch.equal(q.absmax.absmax, state.state2.absmax)
    assert torch.equal(q.absmax.offset, state.offset)
    assert torch.equal(dequantize(q), restored_by_bitsandbytes(packed, state))


@pytest.fixture(scope="module")
def on_the_edge():
    """Pairs (absmax, value) for which value / absmax and value * (1 / absmax) fall on two sides of a boundary."""
    g = torch.Generator().manual_seed(0)
    code = nf4_code()
    boundary = ((code[1:] + code[:-1]) / 2)[torch.randint(15, (2_000_000,), generator=g)]
    absmax = torch.rand(2_000_000, generator=g) + 0.5
    value = absmax * boundary
    differ = (value / absmax > boundary) != (value * (1 / absmax) > boundary)
    return absmax[differ][:200], value[differ][:200]


def test_there_are_values_that_a_division_would_round_to_another_level(on_the_edge):
    assert len(on_the_edge[0]) == 200


@pytest.mark.parametrize("n", [64, 33], ids=["a full block", "the last block, not full"])
def test_the_edge_of_two_levels_is_decided_as_in_bitsandbytes(on_the_edge, n):
    """It multiplies by the reciprocal in full blocks, and divides in a last block that is not full."""
    for absmax, value in zip(*on_the_edge, strict=True):
        w = value.repeat(n)
        w[0] = absmax
        packed, _ = bnb.quantize_4bit(w, quant_type="nf4")
        assert torch.equal(quantize(w).packed, packed.flatten())
