"""One optimizer update over an accumulation window: every labelled token weighs the same, whatever batch it came in.

Formula: the gradient of (1 / N) sum over the window's tokens of -log p, with N counted over ALL micro-batches of the
window; then the gradient is clipped to a norm, then the optimizer steps, then gradients are set to zero. In that order.
Leaves out: mixed precision (unscale before you clip), several processes (N is then the sum over all of them / processes).
In production: `transformers.Trainer` (`num_items_in_batch`, `max_grad_norm`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from finetune_lab.methods.loss import IGNORE_INDEX, sft_loss


def update(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    window: Sequence[tuple[Tensor, Tensor]],
    clip: float,
) -> tuple[float, float]:
    """Train on one window of micro-batches; returns (mean loss of its labelled tokens, norm of the gradient before clipping).

    model: ids (batch, seq) -> logits (batch, seq, vocab). window: pairs of ids and labels, each (batch, seq); the shapes
    may differ from pair to pair. clip: the largest norm over the parameters of optimizer.param_groups together: a
    model that is a plain function has none of its own.
    Source: `transformers.Trainer.training_step`; thread: transformers #34191.
    """
    items = sum(int((labels[:, 1:] != IGNORE_INDEX).sum()) for _, labels in window)
    total = 0.0
    for ids, labels in window:
        loss = sft_loss(model(ids), labels, num_items=items)
        loss.backward()
        total += loss.item()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, clip).item()
    optimizer.step()
    optimizer.zero_grad()
    return total, norm
