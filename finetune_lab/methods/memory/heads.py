"""The output head and the loss: where a large vocabulary costs most.

full: transformers' ForCausalLMLoss (logits everywhere, an fp32 copy, the fp32 log-softmax that is saved, its gradient).
labelled and chunked: `methods.loss.labelled_only_loss` and `chunked_loss`, equal to them to the byte.
In production: `transformers.loss.loss_utils`; Liger's fused linear cross-entropy; Cut Cross-Entropy (2411.09009).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_lab.methods.memory import operations as op
from finetune_lab.methods.memory.tape import Tape
from finetune_lab.methods.memory.values import Value

if TYPE_CHECKING:
    from finetune_lab.methods.memory.model import Decoder

TILE = 2**20  # logits that `chunked_loss` makes at a time


def _nll(tape: Tape, logits: Value, targets: Value) -> Value:
    """cross_entropy: the log-softmax is saved twice over, one storage; backward fills two more of its size."""

    def backward(tape, g, saved, wanted):
        return [tape.new(n, 4, "logits")]

    n = logits.n
    logp = tape.apply([logits], [], op.fresh, n, 4, keep_result=True, kind="logits")
    return tape.apply([logp], [logp, targets, tape.new(1, 4)], backward, 1, 4)


def full(model: Decoder, x: Value, weight: Value) -> Value:
    """(batch, seq, vocab) logits, the shift, the mean."""
    tape, rows = model.tape, model.rows
    given = op.linear(tape, x, weight, rows, kind="logits")
    if model.a.final_softcap:
        given = op.scale(tape, given, "logits")
        given = op.tanh(tape, given, "logits")
        given = op.scale(tape, given, "logits")
    tape.moment = "loss"

    def loss() -> Value:
        logits = op.to(tape, given, 4)
        padded = tape.new(rows + model.batch, 8)
        labels = tape.new(rows, 8) if model.batch > 1 else padded  # one row without its first place is contiguous
        out = _nll(tape, logits, labels)
        del padded
        return out

    return loss()


def labelled(model: Decoder, x: Value, weight: Value, rows: int) -> Value:
    """Logits of `rows` positions: their hidden states are gathered; backward scatters into zeros."""
    tape, hidden = model.tape, model.a.hidden
    before = x.n - model.batch * hidden  # without the last position of each sequence
    states = op.part(tape, x, before)
    counted = tape.new(before // hidden, 1)

    def backward(tape, g, saved, wanted):
        return [tape.new(before, g.size)]

    picked = tape.apply([states], [counted], backward, rows * hidden, x.size)
    logits = op.linear(tape, picked, weight, rows, kind="logits")
    del picked
    tape.moment = "loss"
    total = _nll(tape, op.to(tape, logits, 4), tape.new(rows, 8))
    return op.divide(tape, total, tape.new(1, 8))


def chunked(model: Decoder, x: Value, weight: Value, rows: int) -> Value:
    """Never more than a tile of logits: the gradients are made in the forward pass and kept instead."""
    tape, hidden = model.tape, model.a.hidden
    before = x.n - model.batch * hidden
    states = op.part(tape, x, before)

    def gather(tape, g, saved, wanted):
        return [tape.new(before, g.size)]

    counted = tape.new(rows, 8)
    flat = op.copy(tape, states) if model.batch > 1 else states
    picked = tape.apply([flat], [counted], gather, rows * hidden, x.size)
    del flat
    tape.moment = "loss"
    vocab, wide, targets = weight.n // hidden, x.size < 4, tape.new(rows, 8)
    tile = min(max(256, TILE // rows), vocab)

    def logits(width: int) -> Value:
        narrow = tape.new(rows * width, x.size, "logits")
        return tape.new(rows * width, 4, "logits") if wide else narrow

    def gradient() -> Value:
        """Tiles of the head's gradient, then joined; the fullest is the last whole tile or what remains after it."""
        before = (vocab - 1) // tile * tile
        whole = [(before - tile, tile)] if before else []
        for start, width in [*whole, (before, vocab - before)]:
            done = tape.new(start * hidden, x.size)
            exp, rows_fp32 = logits(width), tape.new(picked.n, 4) if wide else None
            made = tape.new(width * hidden, 4)
            del exp, rows_fp32
            made = op.to(tape, made, x.size)
            if start != before:
                del done, made
        return tape.new(weight.n, x.size)

    def tiled() -> list[Value]:
        target, mixed = tape.new(picked.n, 4), tape.new(picked.n, 4)
        sums = tape.new(4 * rows, 4)  # maximum and sum of each row, before and after
        exp = logits(tile)
        product = [tape.new(rows * tile, x.size, "logits") if wide else exp, tape.new(picked.n, x.size)]
        product.clear()
        del exp
        lse = tape.new(rows, 4)
        quotient = tape.new(picked.n, 4)
        to_x = [op.to(tape, quotient, x.size)]
        del quotient
        made = to_x + ([gradient()] if weight.node is not None else [])
        del target, mixed, sums, lse  # locals until here
        return made

    def backward(tape, g, saved, wanted):
        return [saved[0] if wanted[0] else None, saved[-1] if wanted[1] else None]

    made = tiled()
    total = tape.apply([picked, weight], made, backward, 1, 4)
    del targets
    return op.scale(tape, total)
