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
    total = F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
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


def labelled_only_loss(hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
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
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | int | None = None, tile: int | None = None
) -> Tensor:
    """`labelled_only_loss` over tiles of the vocabulary, with the gradient computed during the forward pass.

    Same arguments and value. tile: rows of `weight` at a time; None makes tiles of logits of about 4 MiB, so that the
    extra memory does not grow with the vocabulary. A frozen head (weight.requires_grad False) costs two matrix
    products and no (vocab, width) gradient; a trained one costs four. Backward may run once, first derivatives only.
    """
    states, targets = shift(hidden, labels)
    counted = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    rows = states.flatten(0, 1).index_select(0, counted)
    tile = tile or max(256, 2**20 // max(len(counted), 1))
    total = _TiledCrossEntropy.apply(rows, weight, targets.flatten()[counted], tile)
    if num_items is None:
        num_items = len(counted)
    return total / num_items


class _TiledCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(rows @ weight.T)[targets], and its gradients, without ever holding (rows, vocab).

    d loss / d rows = softmax(rows @ weight.T) @ weight - weight[targets]: attention of each row over the vocabulary,
    `weight` being keys and values. So the running maximum and sum of FlashAttention (Dao et al. 2022, arXiv
    2205.14135, algorithm 1) compute loss and gradient in one pass over the tiles.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor, tile: int) -> Tensor:
        target_weight = weight[targets].float()
        largest = torch.full((len(rows), 1), -torch.inf, device=rows.device)
        s = torch.zeros_like(largest)  # sum of exp(logit - largest)
        mixed = torch.zeros_like(target_weight)  # sum of exp(logit - largest) * weight row
        for w in weight.split(tile):
            e = (rows @ w.T).float()  # (rows, tile); fp32 from here on
            before, largest = largest, torch.maximum(largest, e.amax(1, keepdim=True))
            e.sub_(largest).exp_()
            old = (before - largest).exp()
            s = s.mul_(old).add_(e.sum(1, keepdim=True))
            if ctx.needs_input_grad[0]:
                mixed.mul_(old).add_(e.to(w.dtype) @ w)
            del e  # else it lives on while the next tile is made: twice the memory
        lse = largest + s.log()
        grad_rows = (mixed / s - target_weight).to(rows.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = _grad_weight(rows, weight, targets, tile, lse) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(grad_rows, grad_weight)
        return (lse.squeeze(1) - (rows.float() * target_weight).sum(1)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor):
        return *(grad if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors), None, None


def _grad_weight(rows: Tensor, weight: Tensor, targets: Tensor, tile: int, lse: Tensor) -> Tensor:
    """Gradient of the summed loss at the head: (softmax - onehot).T @ rows, made in fp32, returned in weight's dtype."""
    grad = torch.cat([((rows @ w.T).float().sub_(lse).exp_().T @ rows.float()).to(w.dtype) for w in weight.split(tile)])
    places, inverse = targets.unique(return_inverse=True)
    picked = torch.zeros(len(places), rows.shape[1], device=rows.device).index_add_(0, inverse, rows.float())
    grad[places] = (grad[places].float() - picked).to(grad.dtype)
    return grad
