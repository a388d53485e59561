"""Log-probabilities of answers: the only thing that preference losses ask of a model.

Formula: log pi(y|x) = sum over the tokens t of the answer y of log pi(y_t | x, y_<t). The prompt x gives no term.
What: the plain form from full logits, and the same numbers from hidden states at the labelled positions alone, tile by
tile of the vocabulary, so that no (positions, vocab) matrix is ever held.
Paper of the running maximum and sum: Dao et al. 2022, FlashAttention (arXiv 2205.14135, algorithm 1).
Leaves out: temperature, soft-capped logits, sharded vocabularies.
In production: `trl.trainer.utils.add_fused_lm_head`; `liger_kernel.chunked_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def sequence_logps(logits: Tensor, labels: Tensor, average: bool = False) -> Tensor:
    """Log-probability of the labelled tokens of each row, fp32, (batch,).

    logits: (batch, seq, vocab); labels: (batch, seq), -100 at the prompt and the padding, not shifted.
    average: divide by the number of labelled tokens (IPO, SimPO, ORPO); a row without any is then nan.
    """
    scores, targets = logits[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    total = -losses.sum(1)
    return total / (targets != IGNORE_INDEX).sum(1) if average else total


def hidden_logps(hidden: Tensor, weight: Tensor, labels: Tensor, average: bool = False) -> Tensor:
    """`sequence_logps(hidden @ weight.T, labels, average)` without full logits: same value, same gradients.

    hidden: (batch, seq, width), the last hidden states; weight: (vocab, width) of the output head; labels: (batch, seq).
    """
    targets = labels[:, 1:]
    counted = targets != IGNORE_INDEX
    logps = target_logps(hidden[:, :-1][counted], weight, targets[counted])
    total = sum_by(logps, counted.nonzero()[:, 0], len(labels))
    return total / counted.sum(1) if average else total


def sum_by(logps: Tensor, group: Tensor, count: int) -> Tensor:
    """Sum of the log-probabilities (n,) of each group 0 .. count-1, fp32, (count,); group: (n,).

    Added up in fp64: one after another in fp32, 64 terms near -11 are 1e-4 off, and beta times that scales a gradient.
    """
    return torch.zeros(count, dtype=torch.float64, device=logps.device).index_add(0, group, logps.double()).float()


def target_logps(states: Tensor, weight: Tensor, targets: Tensor, tile: int | None = None) -> Tensor:
    """log softmax(states @ weight.T)[targets] of each state, fp32, (n,).

    states: (n, width); weight: (vocab, width); targets: (n,) ids. tile: rows of `weight` at a time; None makes tiles
    of logits of about 4 MiB. Two matrix products with a frozen head, four with a trained one (its logits are made
    again in the backward pass). First derivatives only.
    """
    return _TargetLogps.apply(states, weight, targets, tile or max(256, 2**20 // max(len(states), 1)))


class _TargetLogps(torch.autograd.Function):
    """d logp / d state = weight[target] - softmax(logits) @ weight: known in the forward pass, scaled in the backward.

    Each log-probability hangs on its own state only, so the loss behind it, whatever it is, scales whole rows.
    The gradient of the head mixes the rows by that scale: it has to wait for the backward pass.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, targets: Tensor, tile: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        target_weight = weight[targets].float()
        largest = torch.full((len(states), 1), -torch.inf, device=states.device)
        total = torch.zeros_like(largest)  # sum of exp(logit - largest)
        mixed = torch.zeros_like(target_weight) if wanted else None  # sum of exp(logit - largest) * weight row
        for w in weight.split(tile):
            e = (states @ w.T).float()  # (n, tile); fp32 from here on
            before, largest = largest, torch.maximum(largest, e.amax(1, keepdim=True))
            e.sub_(largest).exp_()
            old = (before - largest).exp()
            total = total.mul_(old).add_(e.sum(1, keepdim=True))
            if wanted:
                mixed.mul_(old).add_(e.to(w.dtype) @ w)
            del e  # else it lives on while the next tile is made: twice the memory
        lse = largest + total.log()
        direction = target_weight - mixed.div_(total) if wanted else None
        kept = (states, weight, targets, lse) if ctx.needs_input_grad[1] else (None,) * 4
        ctx.save_for_backward(direction, *kept)
        ctx.tile, ctx.dtype = tile, states.dtype
        return (states.float() * target_weight).sum(1) - lse.squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor):
        direction, states, weight, targets, lse = ctx.saved_tensors
        scale = scale.unsqueeze(1)
        grad_states = None if direction is None else (direction * scale).to(ctx.dtype)
        if not ctx.needs_input_grad[1]:
            return grad_states, None, None, None
        scaled, grad_weight = states.float() * scale, torch.empty_like(weight)
        for w, grad in zip(weight.split(ctx.tile), grad_weight.split(ctx.tile), strict=True):
            grad.copy_((states @ w.T).float().sub_(lse).exp_().neg_().T @ scaled)
        places, inverse = targets.unique(return_inverse=True)
        picked = torch.zeros(len(places), scaled.shape[1], device=scaled.device).index_add_(0, inverse, scaled)
        grad_weight[places] = (grad_weight[places].float() + picked).to(weight.dtype)
        return grad_states, grad_weight, None, None
