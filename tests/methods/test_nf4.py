"""Four bits a weight: the fast form is the simple one, the bytes are counted, bad input is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.lab.meter import peak_bytes
from finetune_lab.methods.codebooks import fp4_code, int_code, nf4_code
from finetune_lab.methods.counts import nf4_bits_per_parameter
from finetune_lab.methods.nf4 import (
    bits_per_parameter,
    dequantize,
    pack,
    quantize,
    simple_dequantize,
    simple_quantize,
    unpack,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CODES = {"nf4": nf4_code(), "fp4": fp4_code(), "int4": int_code(4), "three": torch.tensor([-1.0, 0.0, 1.0])}


def weight(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=80)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from([2, 6, 32, 64, 128]),
    code=st.sampled_from(sorted(CODES)),
    seed=st.integers(0, 99),
)
def test_fast_and_simple_forms_are_equal_to_the_bit(shape, dtype, blocksize, code, seed):
    w, code = weight(shape, dtype, seed), CODES[code]
    packed, absmax = simple_quantize(w, code, blocksize)
    q = quantize(w, code, blocksize)
    assert torch.equal(q.packed, packed) and torch.equal(q.absmax, absmax)
    restored = simple_dequantize(packed, absmax, code, w.shape, blocksize)
    assert torch.equal(dequantize(q), restored.to(dtype))


@pytest.mark.parametrize("n", [2**19, 2**19 + 64, 2**20 + 31, 2**19 - 33])
def test_chunks_leave_no_seam(n):
    w = weight(n, seed=3)
    packed, absmax = simple_quantize(w, nf4_code())
    q = quantize(w)
    assert torch.equal(q.packed, packed) and torch.equal(q.absmax, absmax)
    assert torch.equal(dequantize(q), simple_dequantize(packed, absmax, nf4_code(), w.shape))


def test_values_on_either_side_of_every_boundary_are_decided_alike():
    code = nf4_code()
    edges = (code[1:] + code[:-1]) / 2
    near = torch.cat([edges, edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(-2.0))])
    w = torch.cat([near, torch.ones(64 - len(near))])  # absmax 1: scaled values are the values
    assert torch.equal(quantize(w).packed, simple_quantize(w, code)[0])
    assert unpack(quantize(w).packed)[:15].tolist() == list(range(15))
    assert unpack(quantize(w).packed)[15:30].tolist() == list(range(1, 16))


@given(st.lists(st.integers(0, 15), min_size=1, max_size=50).map(lambda codes: codes + codes))
def test_unpack_undoes_pack_and_the_first_code_is_in_the_high_half(codes):
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(codes)
    assert torch.equal(unpack(packed), codes)
    assert packed[0] == 16 * codes[0] + codes[1] and packed.nbytes * 2 == len(codes)


def test_quantising_a_restored_weight_again_changes_no_bit_of_it():
    once = dequantize(quantize(weight((96, 128))))
    assert torch.equal(dequantize(quantize(once)), once)


def test_zeros_come_back_as_zeros_and_signs_are_kept():
    w = weight((8, 64))
    w[2] = 0
    w[:, ::7] = 0
    back = dequantize(quantize(w))
    assert (back[w == 0] == 0).all()
    assert (back * w >= 0).all()


def test_the_largest_value_of_a_block_comes_back_exactly():
    w = weight((16, 64))
    back = dequantize(quantize(w))
    at = w.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, at), w.gather(1, at), rtol=1e-7, atol=0)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
def test_bits_are_counted_from_the_bytes_and_agree_with_the_formula(blocksize):
    w = weight((1024, 1024))
    assert bits_per_parameter(quantize(w, blocksize=blocksize)) == nf4_bits_per_parameter(blocksize)
    double = bits_per_parameter(quantize(w, blocksize=blocksize, double_quant=True))
    assert double == pytest.approx(nf4_bits_per_parameter(blocksize, 256), abs=5e-5)  # and four bytes of the offset
    if blocksize == 64:
        assert f"{double:.3f}" == "4.127"


def test_double_quantization_costs_hardly_any_accuracy():
    w = weight((256, 256))
    error = [float((dequantize(quantize(w, double_quant=dq)) - w).norm() / w.norm()) for dq in (False, True)]
    assert error[0] < error[1] < 1.005 * error[0]


def test_one_outlier_spoils_its_block_only():
    w = weight(64 * 64)
    w[100] = 100.0
    back = dequantize(quantize(w)).view(64, 64)
    others = [row for row in range(64) if row != 1]
    assert (back[1] == 0).sum() == 63
    assert float((back[others] - w.view(64, 64)[others]).norm() / w.view(64, 64)[others].norm()) < 0.1


def test_dequantize_writes_into_out_and_makes_no_second_weight():
    q = quantize(weight((4096, 1024)))
    out = torch.empty(4096, 1024)
    assert dequantize(q, out=out) is out and torch.equal(out, dequantize(q))
    assert peak_bytes(lambda: dequantize(q, out=out)) < 0.3 * out.nbytes


def test_quantize_needs_four_tenths_of_its_input_more_and_the_simple_form_twice_as_much_as_it():
    w = weight((4096, 2048))
    assert peak_bytes(lambda: quantize(w)) <= 0.4 * w.nbytes
    naive = peak_bytes(lambda: simple_quantize(w, nf4_code()))
    assert naive > 2 * w.nbytes


def test_a_transposed_weight_is_read_in_its_own_order():
    w = weight((48, 64)).T
    assert torch.equal(dequantize(quantize(w)), dequantize(quantize(w.contiguous())))


def test_no_gradient_is_recorded():
    w = weight((8, 64)).requires_grad_()
    q = quantize(w)
    assert not dequantize(q).requires_grad and w.grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [5, 130])
def test_inf_and_nan_are_refused(value, place):
    w = weight(140)
    w[place] = value
    with pytest.raises(ValueError, match="inf or nan"):
        quantize(w)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"w": torch.zeros(0)}, "at least one value"),
        ({"w": torch.arange(4)}, "give a float tensor"),
        ({"blocksize": 63}, "even number"),
        ({"blocksize": 0}, "even number"),
        ({"code": torch.linspace(-1, 1, 17)}, "2 to 16 levels"),
        ({"code": torch.tensor([-2.0, 0, 2])}, r"\[-1, 1\]"),
        ({"code": torch.tensor([-1.0, 0, 0, 0, 1])}, "too close"),
    ],
)
def test_bad_input_is_told_in_one_sentence(arguments, says):
    with pytest.raises(ValueError, match=says):
        quantize(**({"w": weight(256)} | arguments))


def test_an_out_that_starts_at_an_odd_place_is_filled_alike():
    q = quantize(weight((4, 64)))
    out = torch.empty(257)[1:].view(4, 64)
    assert torch.equal(dequantize(q, out=out), dequantize(q))


@pytest.mark.parametrize("out", [torch.empty(3, 64), torch.empty(4, 64, dtype=torch.bfloat16), torch.empty(64, 4).T])
def test_an_out_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match="contiguous"):
        dequantize(quantize(weight((4, 64))), out=out)
