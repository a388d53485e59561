"""A linear layer as peft and bitsandbytes run it: plain, with LoRA, with DoRA, on a quantised base.

Sources: peft 0.21 `tuners/lora/layer.py`, `variants.py`, `dora.py`, `bnb.py`; bitsandbytes 0.50 `MatMul4Bit`, `MatMul8bitLt`.
What costs bytes: an adapter in fp32 on a 16-bit base wants an fp32 copy of its input, computes in fp32 and makes the
sum in fp32; DoRA builds the whole matrix B A (as B(A(identity))), adds it to the weight and takes norms, in every
forward pass; a quantised weight is made whole again in every backward pass.
Leaves out: outliers of LLM.int8(), DoRA on int8, and adapters on embeddings or experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_lab.methods.memory import operations as op
from finetune_lab.methods.memory.architecture import Linear
from finetune_lab.methods.memory.recipe import DTYPES
from finetune_lab.methods.memory.tape import Tape
from finetune_lab.methods.memory.values import Value

if TYPE_CHECKING:
    from finetune_lab.methods.memory.model import Decoder


def dequantised(model: Decoder, linear: Linear, size: int) -> Value:
    """A quantised weight made whole, and its scales with it where they are quantised too."""
    tape, blocks = model.tape, -(-linear.weights // model.r.quant_block)
    scales = tape.new(blocks, 4) if model.r.double_quant else None
    whole = tape.new(linear.weights, model.base)
    del scales
    return op.to(tape, whole, size)


def quantised_linear(model: Decoder, given: Value, linear: Linear, bias: Value | None) -> Value:
    """bitsandbytes' Linear4bit: computes in the base's dtype, saves only the packed weight."""
    tape, x_n = model.tape, given.n

    def backward(tape: Tape, g: Value, saved: list, wanted: list) -> list:
        whole = dequantised(model, linear, model.base)
        out = tape.new(x_n, g.size)
        del whole
        return [out] + [None] * (len(wanted) - 1)

    x = op.to(tape, given, model.base)
    whole = dequantised(model, linear, model.base) if tape.scratch else None  # inside the kernel, or a buffer of it
    parents = [x] if bias is None else [x, bias]
    out = tape.apply(parents, [Value(None, 0, 1)], backward, model.rows * linear.fan_out, model.base)
    del whole
    return op.to(tape, out, given.size)


def int8_linear(model: Decoder, x: Value, linear: Linear, bias: Value | None) -> Value:
    """bitsandbytes' Linear8bitLt: computes in x's dtype and holds x on the node until the graph is gone, checkpoint or not.

    CUDA (MatMul8bitLt, no outliers): x in fp16, then int8 with a scale a row; an int32 product. CPU (MatMul8bitFp): the
    weight made whole. Backward makes it whole on both.
    """
    tape, x_n, out_n = model.tape, x.n, model.rows * linear.fan_out

    def whole(size: int) -> Value:
        weight, scales = tape.new(linear.weights, size), tape.new(linear.fan_out, 4)
        wide = tape.new(linear.weights, 4) if size < 4 and tape.scratch and tape.device == "cpu" else None
        del scales, wide
        return weight

    def backward(tape: Tape, g: Value, saved: list, wanted: list) -> list:
        weight = whole(x_size)
        out = tape.new(x_n, g.size)
        del weight
        return [out] + [None] * (len(wanted) - 1)

    x_size, parents = x.size, [x] if bias is None else [x, bias]
    if tape.device == "cpu":
        work = [whole(x_size)]
    else:
        half = op.to(tape, Value(None, x_n, x_size), 2)
        work = [tape.new(x_n, 1), tape.new(model.rows, 4)]
        del half
        work.append(tape.new(out_n, 4))
        work.append(tape.new(out_n, 2) if model.r.dtype != "fp16" else None)  # the kernel's result is fp16
    out = tape.apply(parents, [], backward, out_n, x_size, holds=x)
    work.clear()
    return out


def base_linear(model: Decoder, x: Value, linear: Linear) -> Value:
    """The frozen or fully trained layer."""
    size = model.base if model.r.quantised and not model.r.int8 else model.rest
    bias = model.weight(f"{linear.name}.bias", linear.fan_out, size, model.full) if linear.bias else None
    if model.r.int8:
        return int8_linear(model, x, linear, bias)
    if model.r.quantised:
        return quantised_linear(model, x, linear, bias)
    weight = model.weight(linear.name, linear.weights, model.base, model.full)
    return op.linear(model.tape, x, weight, model.rows, bias)


def adapted_linear(model: Decoder, given: Value, linear: Linear) -> Value:
    """`given` (rows, fan_in) through the layer and its adapter."""
    tape, recipe, rows = model.tape, model.r, model.rows
    if linear.name not in model.adapted:
        return base_linear(model, given, linear)
    small = DTYPES[recipe.adapter_dtype]
    a = model.weight(f"{linear.name}.lora_A", recipe.rank * linear.fan_in, small, True)
    b = model.weight(f"{linear.name}.lora_B", recipe.rank * linear.fan_out, small, True)
    result = base_linear(model, given, linear)
    size = result.size
    if recipe.quantised and not recipe.int8:
        result = op.copy(tape, result)
    x = cast = op.to(tape, given, small)

    def low_rank(x: Value) -> Value:
        return op.linear(tape, op.linear(tape, x, a, rows), b, rows)

    if recipe.dora:
        base = result
        if recipe.dropout:
            x, base = op.dropout(tape, x, recipe.dropout), None
        result = op.add(tape, result, dora(model, x, linear, a, b, base))
    elif recipe.quantised:
        result = op.add(tape, result, op.to(tape, op.scale(tape, low_rank(op.dropout(tape, x, recipe.dropout))), size))
    else:
        result = op.add(tape, result, op.scale(tape, low_rank(op.dropout(tape, x, recipe.dropout))))
    del cast
    return op.to(tape, result, size)


def dora(model: Decoder, x: Value, linear: Linear, a: Value, b: Value, base: Value | None) -> Value:
    """What DoRA adds to the base's result: (m / |W + s B A| - 1) W x + m / |W + s B A| s B A x."""
    tape, rows, size = model.tape, model.rows, x.size

    def product() -> Value:
        identity = tape.new(linear.fan_in * linear.fan_in, size)
        return op.linear(tape, op.linear(tape, identity, a, linear.fan_in), b, linear.fan_in)

    def norm() -> Value:
        scaled = tape.new(linear.weights, size)
        total = tape.new(linear.weights, size)
        del scaled
        return tape.new(linear.fan_out, total.size)

    held = product()  # detached for the norm, but its graph lives as long as this call
    if model.r.quantised:
        weight = dequantised(model, linear, size)
    else:
        weight = op.to(tape, Value(None, linear.weights, model.base), size)
    norms = norm()
    ratio = op.divide(tape, model.weight(f"{linear.name}.magnitude", linear.fan_out, size, True), norms)
    low = op.linear(tape, op.linear(tape, x, a, rows), b, rows)
    if base is None:
        base = op.linear(tape, x, weight, rows)
    elif linear.bias:
        base = op.add(tape, base, Value(None, linear.fan_out, model.rest))
    out = op.add(tape, op.mul(tape, op.shift(tape, ratio), base), op.scale(tape, op.mul(tape, ratio, low)))
    del held
    return out
