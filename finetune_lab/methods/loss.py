"""The loss of supervised fine-tuning: cross-entropy over the labelled tokens, and only there.

What: token mean over a whole accumulation window, per-sequence mean, and two ways to score only labelled positions.
Formula: L = 1/N * sum over t with labels[t] != -100 of -log p(labels[t] | ids[<t]), N = all labelled tokens of the
window. The logits at position t-1 predict token t: this is the shift.
Leaves out: label smoothing, z-loss, sharded vocabularies. All sums are taken in fp32.
In production: `transformers.loss.loss_utils.ForCausalLMLoss`; `trl.trainer.utils.add_fused_lm_head`; Liger kernels;
Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def shift(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair every position with the token it predicts: scores at t with the label at t+1.

    scores: (batch, seq, anything), logits or hidden states; labels: (batch, seq).
    Returns (batch, seq-1, anything) and (batch, seq-1). The last scores and the first label have no partner.
    """
    return scores[:, :-1], labels[:, 1:]


def sft_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Token-mean cross-entropy over the labelled tokens.

    logits: (batch, seq, vocab); labels: (batch, seq), -100 where a token does not count, not shifted.
    num_items: labelled tokens of the WHOLE accumulation window; None counts those of this batch.
    Returns a scalar in fp32. Not one labelled token and no num_items: 0/0 = nan, as in transformers
    (`has_labels` finds such rows first).
    """
    scores, targets = shift(logits, labels)
    total = F.cross_entropy(
        scores.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum()
    return total / num_items


def sequence_mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over sequences of each sequence's own token mean: a short answer weighs as much as a long one.

    logits: (batch, seq, vocab); labels: (batch, seq). Every row needs a labelled token, else the result is nan.
    """
    scores, targets = shift(logits, labels)
    losses = F.cross_entropy(scores.transpose(1, 2).float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return (losses.sum(1) / (targets != IGNORE_INDEX).sum(1)).mean()


def has_labels(labels: Tensor) -> Tensor:
    """Which rows of `labels` (batch, seq) keep a token to learn from after the shift: bool (batch,)."""
    return (labels[:, 1:] != IGNORE_INDEX).any(1)


def labelled_only_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """`sft_loss(hidden @ weight.T, labels)` that makes logits only for the positions that count.

    hidden: (batch, seq, width), the last hidden states; weight: (vocab, width) of the output head; labels: (batch, seq).
    Memory for the logits shrinks to the labelled fraction; value and gradients stay the same.
    """
    states, targets = shift(hidden, labels)
    counted = targets != IGNORE_INDEX
    logits = states[counted] @ weight.T
    total = F.cross_entropy(logits.float(), targets[counted], reduction="sum")
    if num_items is None:
        num_items = counted.sum()
    return total / num_items


def chunked_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | int | None = None, chunk: int = 128
) -> Tensor:
    """`labelled_only_loss` in chunks of positions, with the gradient computed during the forward pass.

    Same arguments and value; chunk: labelled positions at a time. The largest extra tensor is (chunk, vocab): no
    logits are kept for the backward pass. A frozen head (weight.requires_grad False) costs no (vocab, width) gradient.
    Backward may run once, and only first derivatives exist.
    """
    states, targets = shift(hidden, labels)
    counted = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    rows = states.flatten(0, 1).index_select(0, counted)
    total = _ChunkedCrossEntropy.apply(rows, weight, targets.flatten()[counted], chunk)
    if num_items is None:
        num_items = len(counted)
    return total / num_items


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(rows @ weight.T)[targets], its gradients made chunk by chunk in the forward pass.

    With e = exp(logits - max) and s = sum(e): d loss / d logits = e / s - onehot(target). Neither the division nor the
    one-hot needs a pass over (chunk, vocab): both commute with the matrix product, (e @ weight) / s - weight[target].
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        need_rows, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_rows = torch.empty_like(rows) if need_rows else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), chunk):
            x, target = rows[start : start + chunk], targets[start : start + chunk]
            e = (x @ weight.T).float()  # (chunk, vocab); fp32 from here on
            picked = e.gather(1, target[:, None])
            largest = e.amax(1, keepdim=True)
            s = e.sub_(largest).exp_().sum(1, keepdim=True)
            total += (largest + s.log() - picked).sum()
            if need_rows:
                grad_rows[start : start + chunk] = (e.to(weight.dtype) @ weight).float() / s - weight[target].float()
            if need_weight:
                grad_weight += e.T @ (x.float() / s)
                grad_weight.index_add_(0, target, x.float(), alpha=-1)
            del e  # else it lives on while the next chunk is made: twice the memory
        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor):
        grad_rows, grad_weight = ctx.saved_tensors
        grad_rows = None if grad_rows is None else grad_rows.mul_(grad_total)
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad_total).to(ctx.dtype)
        return grad_rows, grad_weight, None, None
