"""Torch's operations on `Value`s: what each allocates, what it saves for backward, what its backward allocates.

Each function is one line of torch's derivatives.yaml: the saved tensors and the temporaries are those of the C++ formula
(`pow` backward holds three buffers at once, `mul` makes both gradients before it sums one to its shape).
Checked against the operations that a dispatch-mode tracker sees, one by one. `rows` are tokens.
"""

from finetune_lab.methods.memory.tape import Tape
from finetune_lab.methods.memory.values import Value


def same(tape: Tape, g: Value, saved: list, wanted: list) -> list:
    return [g if w else None for w in wanted]


def fresh(tape: Tape, g: Value, saved: list, wanted: list) -> list:
    return [tape.new(g.n, g.size, kind_of(g)) if w else None for w in wanted]


def kind_of(g: Value) -> str:
    return "logits" if g.storage.kind == "logits" else "temporaries"


def to(tape: Tape, x: Value, size: int) -> Value:
    """`x.to(dtype)`: the same tensor where the dtype is the same."""
    if x.size == size:
        return x

    def backward(tape, g, saved, wanted):
        return [tape.new(g.n, x_size, kind_of(g))]

    x_size, kind = x.size, "logits" if x.storage is not None and x.storage.kind == "logits" else "temporaries"
    return tape.apply([x], [], backward, x.n, size, kind=kind)


def add(tape: Tape, a: Value, b: Value) -> Value:
    """a + b with broadcasting and the wider dtype; saves nothing, both gradients are the incoming one."""
    cast = promoted(tape, a, b)
    out = tape.apply([a, b], [], same, max(a.n, b.n), max(a.size, b.size))
    del cast
    return out


def mul(tape: Tape, a: Value, b: Value) -> Value:
    """a * b: saves each for the other's gradient."""

    def backward(tape, g, saved, wanted):
        return [tape.new(g.n, g.size) if w else None for w in wanted]

    saves = [a] * (b.node is not None) + [b] * (a.node is not None)
    cast = promoted(tape, a, b)
    out = tape.apply([a, b], saves, backward, max(a.n, b.n), max(a.size, b.size))
    del cast
    return out


def promoted(tape: Tape, a: Value, b: Value) -> Value | None:
    """The wider copy of the narrower operand that a CPU kernel makes for itself; CUDA kernels cast while they read."""
    if a.size == b.size or tape.device != "cpu" or not tape.scratch:
        return None
    return tape.new(min(a, b, key=lambda v: v.size).n, max(a.size, b.size))


def divide(tape: Tape, a: Value, b: Value) -> Value:
    """a / b where b needs no gradient: saves b."""
    return tape.apply([a], [b], fresh, a.n, a.size)


def scale(tape: Tape, x: Value, kind: str = "temporaries") -> Value:
    """x times or divided by a number; autograd keeps the number as a tensor of 8 bytes on the CPU (no operation makes it)."""
    number = [tape.new(1, 8)] if tape.device == "cpu" and tape.scratch else []
    return tape.apply([x], number, fresh, x.n, x.size, kind=kind)


def scaled_by(tape: Tape, x: Value) -> Value:
    """x times a model's buffer of one number, which is saved."""
    return tape.apply([x], [Value(None, 1, x.size)], fresh, x.n, x.size)


def negate(tape: Tape, x: Value) -> Value:
    return tape.apply([x], [], fresh, x.n, x.size)


def shift(tape: Tape, x: Value) -> Value:
    """x plus a number."""
    return tape.apply([x], [], same, x.n, x.size)


def copy(tape: Tape, x: Value) -> Value:
    """`clone` or `contiguous`: a new storage forward, the same gradient back."""
    return tape.apply([x], [], same, x.n, x.size)


def regrouped(tape: Tape, x: Value) -> Value:
    """A view whose gradient comes back in another memory order and must be copied (transpose, then view)."""
    return tape.apply([x], [], fresh, x.n, x.size, view=x)


def linear(tape: Tape, x: Value, weight: Value, rows: int, bias: Value | None = None, kind="temporaries") -> Value:
    """`F.linear`: saves x for the weight's gradient, the weight for x's; makes the weight's gradient first."""

    def backward(tape, g, saved, wanted):
        to_weight = tape.new(w_n, w_size) if wanted[1] else None
        to_x = tape.new(x_n, x_size) if wanted[0] else None
        return [to_x, to_weight, g if wanted[-1] else None][: len(wanted)]

    x_n, x_size, w_n, w_size = x.n, x.size, weight.n, weight.size
    saves = [x] * (weight.node is not None) + [weight] * (x.node is not None)
    parents = [x, weight] if bias is None else [x, weight, bias]
    del bias
    return tape.apply(parents, saves, backward, rows * weight.n // (x.n // rows), x.size, kind=kind)


def power(tape: Tape, x: Value) -> Value:
    """x ** 2: saves x; backward holds x ** 1, twice that, and the product."""

    def backward(tape, g, saved, wanted):
        power, doubled = tape.new(g.n, g.size), tape.new(g.n, g.size)
        out = tape.new(g.n, g.size)
        del power, doubled
        return [out]

    return tape.apply([x], [x], backward, x.n, x.size)


def mean(tape: Tape, x: Value, rows: int) -> Value:
    """Mean over the last dimension: rows figures."""

    def backward(tape, g, saved, wanted):
        return [tape.new(x_n, g.size)]

    x_n = x.n
    return tape.apply([x], [], backward, rows, x.size)


def rsqrt(tape: Tape, x: Value) -> Value:
    """1 / sqrt(x): saves its result."""

    def backward(tape, g, saved, wanted):
        cubed, scaled = tape.new(g.n, g.size), tape.new(g.n, g.size)
        out = tape.new(g.n, g.size)
        del cubed, scaled
        return [out]

    return tape.apply([x], [], backward, x.n, x.size, keep_result=True)


def activation(tape: Tape, x: Value) -> Value:
    """SiLU, GELU: saves its input. Tanh saves its result and costs the same bytes."""
    return tape.apply([x], [x], fresh, x.n, x.size)


def tanh(tape: Tape, x: Value, kind: str = "temporaries") -> Value:
    return tape.apply([x], [], fresh, x.n, x.size, keep_result=True, kind=kind)


def dropout(tape: Tape, x: Value, share: float) -> Value:
    """CUDA saves a mask of one byte an element; the CPU multiplies by noise of x's dtype. Nothing where the share is 0."""
    if not share:
        return x

    mask = tape.new(x.n, 1 if tape.device == "cuda" else x.size)
    return tape.apply([x], [mask], fresh, x.n, x.size)


def part(tape: Tape, x: Value, n: int) -> Value:
    """A slice (view) of n elements; its gradient is a zero-filled tensor of the whole size."""

    def backward(tape, g, saved, wanted):
        return [tape.new(x_n, g.size)]

    x_n = x.n
    return tape.apply([x], [], backward, n, x.size, view=x)


def halves(tape: Tape, x: Value) -> tuple[Value, Value]:
    """`chunk(2)`: two views; their gradients are put together into a new tensor."""

    def backward(tape, g, saved, wanted):
        return [tape.new(x_n, x_size)]

    x_n, x_size = x.n, x.size
    first = tape.apply([x], [], backward, x.n // 2, x.size, view=x)
    return first, Value(x.storage, x.n // 2, x.size, first.node, 1)


def cat(tape: Tape, parts: list[Value]) -> Value:
    """Concatenate: a new tensor; gradients are views of the incoming one."""

    def backward(tape, g, saved, wanted):
        return [Value(g.storage, n, g.size) if w else None for n, w in zip(sizes, wanted, strict=True)]

    sizes = [p.n for p in parts]
    return tape.apply(parts, [], backward, sum(sizes), parts[0].size)


def bmm(tape: Tape, a: Value, b: Value, n: int) -> Value:
    """Batched matrix product with n results: saves each for the other's gradient."""

    def backward(tape, g, saved, wanted):
        to_b = tape.new(b_n, b_size) if wanted[1] else None
        return [tape.new(a_n, a_size) if wanted[0] else None, to_b]

    a_n, a_size, b_n, b_size = a.n, a.size, b.n, b.size
    return tape.apply([a, b], [a] * (b.node is not None) + [b] * (a.node is not None), backward, n, a.size)


def repeat(tape: Tape, x: Value, times: int, viewed: bool = False) -> Value:
    """Repeat key or value heads: a copy (`viewed`: one head of one sequence needs none); backward sums the groups."""

    def backward(tape, g, saved, wanted):
        return [tape.new(x_n, g.size)]

    x_n = x.n
    view = x if viewed else None
    return tape.apply([x], [], backward, times * x.n, x.size, view=view) if times > 1 else x


def softmax(tape: Tape, x: Value, size: int) -> Value:
    """`softmax(x, dtype=...)`: the cast lives during the call; saves its result."""
    return tape.apply([cast := to(tape, x, size)], [], fresh, cast.n, size, keep_result=True)


def attention(tape: Tape, q: Value, k: Value, v: Value, scores: int) -> Value:
    """Fused attention (flash): saves q, k, v, its result and one fp32 log-sum-exp for each row and head (`scores`)."""

    def backward(tape, g, saved, wanted):
        return [tape.new(n, size) if w else None for n, w in zip(sizes, wanted, strict=True)]

    size, sizes = q.size, [q.n, k.n, v.n]
    log_sum = tape.new(scores, 4)
    out = tape.apply([q, k, v], [q, k, v, log_sum], backward, q.n, size, keep_result=True)
    return out


def embedding(tape: Tape, weight: Value, n: int) -> Value:
    def backward(tape, g, saved, wanted):
        return [tape.new(w_n, w_size)]

    w_n, w_size = weight.n, weight.size
    return tape.apply([weight], [], backward, n, weight.size)
