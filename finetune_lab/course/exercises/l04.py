"""The exercises of lesson 04, NF4 and QLoRA: what people get wrong, and the hint for each mistake.

The wrong answers come from public notes (quantiles of 16 equal bins, one absmax for a whole tensor, INT8 scales, merging
in 4 bits) and from what a first implementation usually misses (nibble order, padding, the forgotten None).
"""

import torch
import torch.nn.functional as F
from torch import nn

from finetune_lab.course.checks import Wrong, case, exercise
from finetune_lab.course.compare import difference
from finetune_lab.methods import blockwise, codebooks, nf4, nf4_linear, qlora
from finetune_lab.methods.lora import LoRALinear

# 04.1 nf4_code


def levels(steps_above=8, steps_below=7, offset=codebooks.NF4_OFFSET, zero=True, scale=True, negate=True):
    """`nf4_code` with one mistake."""

    def nf4_code():
        above = codebooks.ndtri(torch.linspace(offset, 0.5, steps_above + 1)[:-1].double())
        below = codebooks.ndtri(torch.linspace(offset, 0.5, steps_below + 1)[:-1].double())
        parts = [-below if negate else below, above] + [torch.zeros(1)] * zero
        code = torch.cat(parts).float().sort().values
        return code / code.max() if scale else code

    return nf4_code


def cast_last():
    """Divided in double: 6 levels differ in their last bit."""
    above = codebooks.ndtri(torch.linspace(codebooks.NF4_OFFSET, 0.5, 9)[:-1].double())
    below = -codebooks.ndtri(torch.linspace(codebooks.NF4_OFFSET, 0.5, 8)[:-1].double())
    code = torch.cat([below, torch.zeros(1), above]).sort().values
    return (code / code.max()).float()


def double_steps():
    """The steps of probability in double from the start: 8 levels differ in their last bits."""
    above = codebooks.ndtri(torch.linspace(codebooks.NF4_OFFSET, 0.5, 9, dtype=torch.double)[:-1])
    below = -codebooks.ndtri(torch.linspace(codebooks.NF4_OFFSET, 0.5, 8, dtype=torch.double)[:-1])
    code = torch.cat([below, torch.zeros(1), above]).float().sort().values
    return code / code.max()


def to_the_bit(expected, got):
    """NF4 itself bit for bit; a wrong answer, compared for its hint, up to rounding."""
    exact = 0 if difference(codebooks.nf4_code(), expected) is None else None
    return difference(expected, got, exact, exact)


def last_bits(one, expected, got):
    if difference(expected, got) is None:
        return "right but for the last bits: torch.linspace(...).double(), ndtri, cast to fp32, divide, in this order"


def even_levels():
    return torch.linspace(-1, 1, 16)


def both_halves_end():
    """The zero of both halves is kept: two zeros, 17 levels."""
    above = codebooks.ndtri(torch.linspace(codebooks.NF4_OFFSET, 0.5, 9).double())
    below = -codebooks.ndtri(torch.linspace(codebooks.NF4_OFFSET, 0.5, 8).double())
    code = torch.cat([below, above]).float().sort().values
    return code / code.max()


exercise(
    "04.1", "the levels of NF4", codebooks.nf4_code, lambda draw: [case()], compare=to_the_bit, diagnose=last_bits,
    wrong=[
        Wrong(cast_last, "right but for the last bit of some levels: cast to fp32 first, then divide by the largest"),
        Wrong(double_steps, "right but for the last bits: the steps of probability are fp32 made double, "
              "torch.linspace(a, b, n).double()"),
        Wrong(codebooks.symmetric_quantile_code, "these are the quantiles of 16 equal bins, as many notes write it: symmetric "
              "and without a zero; NF4 takes 8 quantiles above zero, 7 below, and 0 itself"),
        Wrong(even_levels, "these levels are evenly spaced: space the probabilities evenly, and take their quantiles"),
        Wrong(levels(7, 8), "the split is the wrong way round: 8 steps above zero, 7 below"),
        Wrong(levels(8, 8), "17 levels: below zero there are only 7 steps, so that one of the 16 is left for zero"),
        Wrong(both_halves_end, "zero stands in it twice: both halves end at probability 1/2, drop that end of each"),
        Wrong(levels(zero=False), "the exact zero is missing: add it to the 15 quantiles"),
        Wrong(levels(scale=False), "divide by the largest level: the code spans -1 to 1, absmax does the rest"),
        Wrong(levels(offset=1.0), "the quantile of probability 1 is infinite: start both halves at NF4_OFFSET"),
        Wrong(levels(negate=False), "the lower half must be negative: mirror its quantiles with a minus"),
    ],
)  # fmt: skip


# 04.2 round_trip


def weight_cases(draw):
    code = codebooks.nf4_code()
    for blocksize, (rows, columns) in zip((8, 16, 6), draw.sizes(3, 9, 21), strict=True):
        w = draw.normal(rows, columns)
        w[0, 0], w[1] = -9.0, 20 * w[1]  # the largest is negative; blocks of very different size
        yield case(w, code, blocksize)
    w = draw.normal(2, 12)
    w[0] = 0
    yield case(w, codebooks.int_code(4), 12)  # a block of zeros


def tripped(
    absmax_of=lambda x: x.abs().amax(1, keepdim=True), restore=True, pick=codebooks.nearest, cut=True, flat=None
):
    """`round_trip` with one mistake."""

    def round_trip(w, code, blocksize):
        x = codebooks.blocks(w if flat is None else flat(w), blocksize)
        absmax = absmax_of(x)
        restored = code[pick(x / absmax.clamp(min=1e-38), code).long()] * (absmax if restore else 1)
        restored = restored.flatten()
        if flat is not None:
            return restored[: w.numel()].view(w.shape[::-1]).T
        return restored[: w.numel()].view(w.shape) if cut else restored

    return round_trip


def level_below(x, code):
    """The largest level that is not above x."""
    return (torch.bucketize(x, code, right=True) - 1).clamp(0, len(code) - 1)


def no_clamp(w, code, blocksize):
    x = codebooks.blocks(w, blocksize)
    absmax = x.abs().amax(1, keepdim=True)
    picked = (x / absmax)[..., None].sub(code).abs().argmin(-1)
    restored = code[picked] * absmax / (absmax > 0)
    return restored.flatten()[: w.numel()].view(w.shape)


exercise(
    "04.2", "quantise in blocks and restore", codebooks.round_trip, weight_cases,
    wrong=[
        Wrong(tripped(lambda x: x.abs().max().expand(len(x), 1)), "one absmax for the whole tensor, as public notes have it: "
              "each block (row of x) has its own, so that an outlier spoils its own block only"),
        Wrong(tripped(lambda x: x.amax(1, keepdim=True)), "the largest value is not the largest magnitude: take abs() first"),
        Wrong(tripped(lambda x: x.abs().amax(0, keepdim=True)), "the maximum runs the wrong way: blocks are the rows of x, "
              "reduce over dim 1"),
        Wrong(tripped(lambda x: x.std(1, keepdim=True)), "the scale is the largest magnitude of the block, not its standard "
              "deviation: levels end at 1, larger values would be cut off"),
        Wrong(tripped(restore=False), "these are levels between -1 and 1: multiply by the block's absmax again"),
        Wrong(tripped(pick=level_below), "you take the level below: take the nearest, nearest(x, code)"),
        Wrong(tripped(cut=False), "the shape is lost: drop the padding of the last block and view as w.shape"),
        Wrong(tripped(flat=lambda w: w.T), "blocks run along the rows of w, as memory does: do not transpose"),
        Wrong(no_clamp, "a block of zeros has absmax 0, and 0/0 is nan: clamp the divisor from below"),
    ],
)  # fmt: skip


# 04.3 pack


def code_cases(draw):
    for n in (4, 10, 6):
        yield case(draw.ints(0, 16, n).to(torch.uint8))
    yield case(torch.tensor([15, 0, 0, 15, 1, 2, 8, 7], dtype=torch.uint8))


def low_first(codes):
    return codes[1::2] << 4 | codes[::2]


def halves(codes):
    half = len(codes) // 2
    return codes[:half] << 4 | codes[half:]


def one_each(codes):
    return codes << 4


def three_bits(codes):
    return codes[::2] << 3 | codes[1::2]


def wide(codes):
    return codes[::2].long() << 4 | codes[1::2].long()


exercise(
    "04.3", "two codes in a byte", nf4.pack, code_cases,
    wrong=[
        Wrong(low_first, "the nibbles are swapped: the first code of a pair goes to the high half"),
        Wrong(halves, "neighbours share a byte: codes 0 and 1, 2 and 3; not the first half with the second"),
        Wrong(one_each, "still one byte a code: combine codes[::2] and codes[1::2]"),
        Wrong(three_bits, "shifted by 3: sixteen levels need 4 bits, else two codes overlap"),
        Wrong(wide, "these are int64, 8 bytes each: keep uint8, or nothing is saved"),
    ],
)  # fmt: skip


# 04.4 simple_dequantize


def packed_cases(draw):
    code = codebooks.nf4_code()
    for blocksize, (rows, columns) in zip((4, 6, 8), draw.sizes(3, 5, 11), strict=True):
        w = draw.normal(rows, columns)
        w[0] *= 10
        packed, absmax = nf4.simple_quantize(w, code, blocksize)
        yield case(packed, absmax, code, w.shape, blocksize)
    w = draw.normal(3, 7)  # 21 values: an odd number, and a block that is not full
    yield case(*nf4.simple_quantize(w, code, 4), code, w.shape, 4)


def restored(unpack=nf4.unpack, scale=lambda values, absmax, size: codebooks.blocks(values, size) * absmax[:, None],
             index=lambda code, q: code[q], shape=lambda flat, shape: flat.view(shape)):  # fmt: skip
    """`simple_dequantize` with one mistake."""

    def simple_dequantize(packed, absmax, code, shape_, blocksize=64):
        values = index(code, unpack(packed).long())[: shape_.numel()]
        return shape(scale(values, absmax, blocksize).flatten()[: shape_.numel()], shape_)

    return simple_dequantize


def unpack_swapped(packed):
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()


def unpack_halves(packed):
    return torch.cat([packed >> 4, packed & 15])


def interleaved(values, absmax, size):
    return values * absmax.repeat(size)[: len(values)]


exercise(
    "04.4", "from bytes to weights", nf4.simple_dequantize, packed_cases,
    wrong=[
        Wrong(restored(unpack_swapped), "the nibbles are swapped: the high half of a byte comes first (unpack does it)"),
        Wrong(restored(unpack_halves), "the two codes of a byte are neighbours: stack high and low halves as pairs, then "
              "flatten"),
        Wrong(restored(scale=lambda values, absmax, size: values), "these are levels between -1 and 1: multiply each block by "
              "its absmax"),
        Wrong(restored(scale=lambda values, absmax, size: values * absmax.max()), "one scale for all: each block has its own "
              "absmax"),
        Wrong(restored(scale=interleaved), "scale k belongs to the values k * blocksize onwards, not to every k-th value"),
        Wrong(restored(index=lambda code, q: q / 15 * 2 - 1), "a code is an index into the code book, not a number on an even "
              "grid: code[index]"),
        Wrong(restored(shape=lambda flat, shape: flat), "give the weight its shape back: .view(shape)"),
    ],
)  # fmt: skip


# 04.5 double_quantize


def absmax_cases(draw):
    for n in (40, 300, 700):
        yield case(draw.normal(n).abs() + 2)


def parts(fn, absmax):
    """The three stored parts and the block size of what the answer returns."""
    scales = fn(absmax)
    return scales.codes, scales.absmax, scales.offset, scales.blocksize


def scaled(offset_of=lambda a: a.mean(), sign=-1, kept=lambda offset: offset, size=256, signed=True):
    """`double_quantize` with one mistake."""

    def double_quantize(absmax, blocksize=256):
        offset = offset_of(absmax)
        codes, second = blockwise.quantize_blockwise(absmax + sign * offset, signed=signed, blocksize=size)
        return blockwise.Scales(codes, second, kept(offset), size)

    return double_quantize


def int8_scales(absmax, blocksize=256):
    offset = absmax.mean()
    x = codebooks.blocks(absmax - offset, blocksize)
    second = x.abs().amax(1)
    codes = (x / second[:, None] * 127).round().flatten()[: len(absmax)].to(torch.int8)
    return blockwise.Scales(codes, second, offset, blocksize)


exercise(
    "04.5", "quantise the scales", blockwise.double_quantize, absmax_cases, call=parts,
    wrong=[
        Wrong(scaled(sign=0, kept=lambda offset: 0 * offset), "scales are all positive, so half of the signed code is wasted: "
              "take their mean off first, and keep it as the offset"),
        Wrong(scaled(sign=0), "the offset is stored but never taken off: quantise absmax - offset"),
        Wrong(scaled(sign=1), "the mean is added: take it off, so that the values lie around zero"),
        Wrong(scaled(kept=lambda offset: 0 * offset), "the offset must be stored: without it the scales come back around zero"),
        Wrong(scaled(lambda a: a.min()), "the offset is the mean, not the smallest scale: both halves of the signed code "
              "are then used"),
        Wrong(scaled(size=64), "the second level has blocks of 256 scales (blocksize), not of 64"),
        Wrong(scaled(signed=False), "after the mean is off, values are negative too: use the signed code"),
        Wrong(int8_scales, "this is INT8, even steps: double quantization uses the dynamic 8-bit code, quantize_blockwise"),
    ],
)  # fmt: skip


# 04.6 NF4Function


def layer_cases(draw):
    for bias, (rows, fan_in, fan_out) in zip((True, False, True), draw.sizes(3, 3, 9, dims=3), strict=True):
        q = nf4.quantize(draw.normal(2 * fan_out, 8 * fan_in), blocksize=8)
        biases = draw.normal(2 * fan_out) if bias else None
        yield case(q, draw.normal(rows, 8 * fan_in), biases, draw.normal(rows, 2 * fan_out))


def both_ways(cls, q, x, bias, grad_y):
    """Output, and the gradients of input and bias; None where the answer gives none."""
    apply = cls.apply if issubclass(cls, torch.autograd.Function) else cls()
    wanted = [t.clone().requires_grad_() for t in (x, bias) if t is not None]
    y = apply(wanted[0], q, wanted[1] if bias is not None else None)
    return y.detach(), torch.autograd.grad(y, wanted, grad_y, allow_unused=True)


def function_with(backward):
    """The right forward and a wrong backward."""

    def forward(ctx, x, q, bias):
        ctx.q = q
        return F.linear(x, nf4.dequantize(q).to(x.dtype), bias)

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("NF4Function", (torch.autograd.Function,), parts)


def gradients(x_of=lambda grad_y, q: grad_y @ nf4.dequantize(q), bias_of=lambda grad_y: grad_y.sum(0)):
    """A backward with another gradient of x or of the bias."""

    def backward(ctx, grad_y):
        return x_of(grad_y, ctx.q), None, bias_of(grad_y) if ctx.needs_input_grad[2] else None

    return backward


def one_gradient(ctx, grad_y):
    return grad_y @ nf4.dequantize(ctx.q)


def swapped_order(ctx, grad_y):
    return None, grad_y @ nf4.dequantize(ctx.q), grad_y.sum(0) if ctx.needs_input_grad[2] else None


def levels_only(grad_y, q):
    return grad_y @ q.code[nf4.unpack(q.packed).long()].view(q.shape)


exercise(
    "04.6", "gradients through a 4-bit weight", nf4_linear.NF4Function, layer_cases, call=both_ways,
    wrong=[
        Wrong(function_with(gradients(lambda grad_y, q: None)), "no gradient reaches x: frozen means that the weight gets "
              "none; the layers below still need theirs, grad_y @ W"),
        Wrong(function_with(one_gradient), "backward returns one value for each input of forward: x, q (None), bias"),
        Wrong(function_with(swapped_order), "the gradients stand in the order of forward's inputs: x, q (None), bias"),
        Wrong(function_with(gradients(lambda grad_y, q: grad_y @ nf4.dequantize(q).T)), "forward multiplied by W transposed, "
              "backward multiplies by W itself: (rows, out) @ (out, in)"),
        Wrong(function_with(gradients(levels_only)), "these are the levels: the weight is level times absmax, "
              "dequantize(ctx.q)"),
        Wrong(function_with(gradients(bias_of=lambda grad_y: None)), "a bias is a full-precision parameter and may be "
              "trained: its gradient is grad_y summed over the rows"),
        Wrong(function_with(gradients(bias_of=lambda grad_y: grad_y.mean(0))), "the bias acts on every row: sum its gradient "
              "over the rows, the mean belongs to the loss"),
    ],
)  # fmt: skip


# 04.7 merge_dequantized


def qlora_cases(draw):
    for bias, (fan_in, fan_out) in zip((True, False, True), draw.sizes(3, 2, 6), strict=True):
        linear = nn.Linear(16 * fan_in, 2 * fan_out, bias=bias)
        linear.weight.data = draw.normal(2 * fan_out, 16 * fan_in)
        if bias:
            linear.bias.data = draw.normal(2 * fan_out)
        layer = LoRALinear(nf4_linear.NF4Linear.from_linear(linear, blocksize=16), r=2, alpha=6)
        layer.A.data, layer.B.data = draw.normal(2, 16 * fan_in), draw.normal(2 * fan_out, 2)
        yield case(layer, draw.normal(3, 16 * fan_in))


def merged_parts(fn, layer, x):
    """What the merged layer holds and what it says."""
    merged = fn(layer)
    return type(merged).__name__, merged.weight, merged.bias, merged(x), merged.weight.requires_grad


def with_weight(weight_of, keep_bias=True, frozen=True):
    """`merge_dequantized` with another weight, or without the bias."""

    def merge_dequantized(layer):
        bias = layer.base.bias if keep_bias else None
        merged = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
        merged.weight = nn.Parameter(weight_of(layer).detach(), requires_grad=not frozen)
        merged.bias = bias
        return merged

    return merge_dequantized


def again_in_4bit(layer):
    weight = layer.base.dequantize() + layer.delta()
    return nf4.dequantize(nf4.quantize(weight, blocksize=layer.base.blocksize))


exercise(
    "04.7", "merge a QLoRA adapter", qlora.merge_dequantized, qlora_cases, call=merged_parts,
    wrong=[
        Wrong(with_weight(again_in_4bit), "the merged weight is rounded to 4 bits again: this is the trap, most of the update "
              "is lost; keep it dense"),
        Wrong(with_weight(lambda layer: layer.base.dequantize() + layer.B @ layer.A), "the scaling alpha / r is missing: add "
              "layer.scaling * B A"),
        Wrong(with_weight(lambda layer: layer.delta()), "this is the update alone: add it to the dequantised base"),
        Wrong(with_weight(lambda layer: layer.base.dequantize()), "this is the base alone: add layer.scaling * B A"),
        Wrong(with_weight(lambda layer: layer.base.dequantize() + layer.delta(), keep_bias=False), "the bias is lost: the "
              "merged layer takes over layer.base.bias"),
        Wrong(with_weight(lambda layer: layer.base.dequantize() - layer.delta()), "the update is added, not taken off"),
    ],
)  # fmt: skip
