"""The output head and the loss: where a large vocabulary costs most.

full: transformers' ForCausalLMLoss (logits everywhere, an fp32 copy, the fp32 log-softmax that is saved, its gradient).
labelled and chunked: `methods.loss.labelled_only_loss` and `chunked_loss`, equal to them up to some small index tensors.
In production: `transformers.loss.loss_utils`; Liger's fused linear cross-entropy; Cut Cross-Entropy (2411.09009).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_lab.methods.memory import operations as op
from finetune_lab.methods.memory.tape import Tape, Value

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

    places = tape.new(2 * rows, 8)
    picked = tape.apply([states], [places], backward, rows * hidden, x.size)
    logits = op.linear(tape, picked, weight, rows, kind="logits")
    tape.moment = "loss"
    out = _nll(tape, op.to(tape, logits, 4), tape.new(rows, 8))
    del counted
    return out


def chunked(model: Decoder, x: Value, weight: Value, rows: int) -> Value:
    """Never more than a tile of logits: the gradients are made in the forward pass and kept instead."""
    tape, hidden = model.tape, model.a.hidden
    before = x.n - model.batch * hidden
    states = op.part(tape, x, before)

    def gather(tape, g, saved, wanted):
        return [tape.new(before, g.size)]

    picked = tape.apply([states], [tape.new(rows, 8)], gather, rows * hidden, x.size)
    tape.moment = "loss"
    tile = max(256, TILE // rows) * rows
    target, mixed = tape.new(picked.n, 4), tape.new(picked.n, 4)
    tape.new(tile, x.size, "logits"), tape.new(tile, 4, "logits")  # one tile, and its fp32 copy
    to_x = tape.new(picked.n, x.size)
    to_weight = None
    if weight.node is not None:
        to_weight = tape.new(weight.n, weight.size)
        tape.new(weight.n, weight.size)  # the tiles before they are joined
    del target, mixed

    def backward(tape, g, saved, wanted):
        return [saved[0] if wanted[0] else None, saved[-1] if wanted[1] else None]

    return tape.apply([picked, weight], [v for v in (to_x, to_weight) if v], backward, 1, 4)
