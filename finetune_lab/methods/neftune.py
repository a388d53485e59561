"""NEFTune: uniform noise on the embeddings while training, nothing at all otherwise.

Paper: Jain et al. 2023, arXiv 2310.05914, algorithm 1.
Formula: e' = e + (alpha / sqrt(L d)) u, every entry of u uniform in (-1, 1); L tokens of d numbers each.
So the standard deviation of an entry is alpha / sqrt(3 L d), and the expected size of a sequence's whole noise is
alpha / sqrt(3) (2.887 for alpha = 5), however long or wide it is. Not Gaussian, and alpha is not squared.
L is the PADDED length, as transformers takes it: a short row beside a long one gets less noise than alone, and rows
laid end to end (padding-free) share the noise of one sequence.
Leaves out: quantised embeddings. Production: `SFTConfig(neftune_noise_alpha=5)`, `transformers.integrations.neftune`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def neftune_noise(embeddings: Tensor, alpha: float) -> Tensor:
    """Noise of the shape and dtype of `embeddings` (batch, seq, width), uniform in +-alpha / sqrt(seq * width)."""
    bound = alpha / torch.sqrt(torch.tensor(embeddings.shape[1] * embeddings.shape[2]))
    return torch.zeros_like(embeddings).uniform_(-bound, bound)


@contextmanager
def neftune(embedding: nn.Module, alpha: float) -> Iterator[None]:
    """Add the noise to what `embedding` returns in train mode, inside the `with` block only.

    embedding: `model.get_input_embeddings()`. A forward hook, not a wrapper: `embedding.weight` stays where it is, so
    a tied head, peft and resizing still find it, and its values are never touched. Raises ValueError for alpha < 0.
    """
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}: give a number from 0 (no noise) up; the paper uses 5, 10 and 15")

    def add_noise(module: nn.Module, _, output: Tensor) -> Tensor | None:
        return output + neftune_noise(output, alpha) if module.training else None

    hook = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
