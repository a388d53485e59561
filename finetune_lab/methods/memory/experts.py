"""A mixture of experts as transformers 5.23 runs it: every token's states are copied once for each expert it goes to.

    S = tokens x experts per token; kept for backward: S h (input) + 3 S i (gate and up, their product) + S h (output)
Sources: `MixtralSparseMoeBlock`, `Qwen3MoeSparseMoeBlock`, `integrations/moe.py` (`grouped_mm_experts_forward`, the default
where torch has grouped_mm). Its sizes do not depend on which expert a token goes to, so no routing has to be assumed.
The k probabilities are normalised (Mixtral; Qwen3-MoE as published). Leaves out: the load-balancing loss (off unless
`output_router_logits`), the loop over experts, expert parallelism, adapters on experts (peft 0.21's "all-linear" adds
B A to the whole stack of experts: a ValueError), 4 bits on experts (no `nn.Linear`: bitsandbytes passes them by,
and peft's prepare_model_for_kbit_training makes them fp32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_lab.methods.memory import operations as op
from finetune_lab.methods.memory.tape import Tape
from finetune_lab.methods.memory.values import Value

if TYPE_CHECKING:
    from finetune_lab.methods.memory.model import Decoder


def gather(tape: Tape, x: Value, places: Value, n: int) -> Value:
    """x[places], n elements: saves the places; backward adds into zeros."""

    def backward(tape: Tape, g: Value, saved: list, wanted: list) -> list:
        return [tape.new(x_n, g.size)]

    x_n = x.n
    return tape.apply([x], [places], backward, n, x.size)


def grouped(tape: Tape, x: Value, weight: Value, ends: Value, n: int) -> Value:
    """`grouped_mm`: each group of rows by its own matrix, n results."""

    def backward(tape: Tape, g: Value, saved: list, wanted: list) -> list:
        to_weight = tape.new(w_n, w_size) if wanted[1] else None
        return [tape.new(x_n, x_size) if wanted[0] else None, to_weight]

    x_n, x_size, w_n, w_size = x.n, x.size, weight.n, weight.size
    saves = [x] * (weight.node is not None) + [weight] * (x.node is not None) + [ends]
    return tape.apply([x, weight], saves, backward, n, x.size)


def router(model: Decoder, x: Value) -> tuple[Value, Value, Value]:
    """(logits, the k largest probabilities of each token divided by their sum, which experts)."""
    tape, rows, a = model.tape, model.rows, model.a
    weight = model.weight("router", a.experts * a.hidden, model.rest, model.full)
    logits = op.linear(tape, x, weight, rows)
    probabilities = op.softmax(tape, logits, 4)
    chosen = tape.new(rows * a.experts_per_token, 8)

    def scatter(tape: Tape, g: Value, saved: list, wanted: list) -> list:
        return [tape.new(rows * a.experts, 4)]

    top = tape.apply([probabilities], [chosen], scatter, rows * a.experts_per_token, 4)
    total = tape.apply([top], [], op.same, rows, 4)  # its gradient is expanded, not copied

    def divided(tape: Tape, g: Value, saved: list, wanted: list) -> list:
        to_top = tape.new(g.n, 4)
        minus, once = tape.new(g.n, 4), tape.new(g.n, 4)
        twice = tape.new(g.n, 4)
        del once
        to_total = tape.new(g.n, 4)
        del minus, twice
        return [to_top, to_total]

    before = tape.new(top.n, 4)  # in place: autograd keeps a copy of what it divides
    top = tape.apply([top, total], [total, before], divided, top.n, 4, view=top)
    del before
    return logits, op.to(tape, top, logits.size) if a.family == "qwen3_moe" else top, chosen


def experts(model: Decoder, x: Value) -> Value:
    """x (rows, hidden) through its experts; the block's locals are held as transformers holds them."""
    _, weights, chosen = router(model, x)
    return run(model, x, weights, chosen)


def run(model: Decoder, x: Value, weights: Value, chosen: Value) -> Value:
    tape, a, h, wide = model.tape, model.a, model.a.hidden, model.a.expert_intermediate
    s = chosen.n
    order, places = tape.new(s, 8), tape.new(s, 8)  # sorted by expert, and the permutation
    states = gather(tape, x, tape.new(s, 8), s * h)
    shares = gather(tape, weights, places, s)
    counted, counts = tape.new(s, 4), tape.new(a.experts, 4)
    ends = tape.new(a.experts, 4)

    def gated(x: Value) -> Value:
        gate, up = op.halves(tape, x)
        return op.mul(tape, op.activation(tape, gate), up)

    up = model.weight("experts.gate_up_proj", 2 * a.experts * wide * h, model.rest, model.full)
    out = grouped(tape, states, up, ends, 2 * s * wide)
    out = gated(out)
    down = model.weight("experts.down_proj", a.experts * wide * h, model.rest, model.full)
    out = grouped(tape, out, down, ends, s * h)
    weighted = op.mul(tape, out, shares)
    back = tape.new(s, 8)
    tape.new(s, 8)  # arange
    weighted = gather(tape, weighted, back, s * h)

    def spread(tape: Tape, g: Value, saved: list, wanted: list) -> list:
        return [tape.new(s * h, g.size)]

    total = tape.apply([weighted], [], spread, x.n, weighted.size)
    result = op.to(tape, total, x.size)
    del order, counted, counts  # locals until here
    return result
