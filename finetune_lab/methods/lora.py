"""LoRA: a frozen linear layer plus a trained product of two thin matrices.

Paper: Hu et al. 2021, arXiv 2106.09685, equation 3: h = W0 x + (alpha/r) B A x, with A (r, in) and B (out, r).
A projects down, B projects up. B starts at zero, so the layer starts as the frozen one, whatever alpha is.
rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) divides alpha by sqrt(r) instead of r: the update's scale stays when r grows.
Leaves out: embeddings, convolutions, a bias of the adapter. The faster form is `lora_fused`, whole models are in `inject`.
In production: `peft.LoraConfig`, `peft.tuners.lora.Linear`.
"""

import math
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lora_scaling(alpha: float, r: int) -> float:
    """alpha / r: the factor in front of B A x (section 4.1 of the paper)."""
    return alpha / r


def rslora_scaling(alpha: float, r: int) -> float:
    """alpha / sqrt(r): rank-stabilised LoRA. With alpha = 2r this grows like 2 sqrt(r): keep alpha when r changes."""
    return alpha / math.sqrt(r)


class LoRALinear(nn.Module):
    """`base` with a low-rank update beside it: base(x) + scaling * dropout(x) A^T B^T.

    base: nn.Linear, or any module with `in_features`, `out_features` and forward (a 4-bit layer); transformers'
        Conv1D too. It is frozen here. Inputs are (..., in_features), outputs (..., out_features).
    r: rank, at least 1. alpha: the scale's numerator. scale: `lora_scaling` or `rslora_scaling`.
    dtype: of A and B; None takes the base's, but no less than fp32 (peft's `autocast_adapter_dtype`).
    A (r, in) starts uniform in +-1/sqrt(in), B (out, r) at zero, as in loralib and peft.
    """

    def __init__(
        self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, *, scale=lora_scaling, dtype=None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = features(base)
        if r < 1:
            raise ValueError(f"r is {r}: the rank must be a whole number of at least 1")
        like = next(chain(base.parameters(), base.buffers()))  # a 4-bit layer has buffers only
        dtype = dtype or torch.promote_types(like.dtype, torch.float32)
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=like.device))
        self.B = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=like.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))
        self.dropout = nn.Dropout(dropout)
        self.r, self.alpha, self.scale, self.scaling = r, alpha, scale, scale(alpha, r)
        self.enabled, self.merged = True, False

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the base's dtype; the update is computed in that of A."""
        h = self.base(x)
        if not self.enabled or self.merged:
            return h
        down = F.linear(self.dropout(x.to(self.A.dtype)), self.A)  # (..., r)
        return (h + F.linear(down, self.B) * self.scaling).to(h.dtype)

    def delta(self) -> Tensor:
        """The update scaling * B A, shape (out_features, in_features), in the dtype of A; its rank is at most r."""
        return self.B @ self.A * self.scaling

    @property
    def weight(self) -> Tensor:
        """The weight (out_features, in_features) that this layer acts with now, in the base's dtype."""
        return self.base_weight if not self.enabled or self.merged else self.adapted_weight()

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight as (out_features, in_features), whatever way the base stores it."""
        return dense_weight(self.base)

    def adapted_weight(self) -> Tensor:
        """W0 + scaling * B A, added in the dtype of A and rounded once to the base's."""
        return (self.base_weight + self.delta()).to(self.base_weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the adapted weight into the base, and keep the old one so that `unmerge` restores every bit.

        Raises ValueError when it is merged already, or when the base is quantised.
        """
        if self.merged:
            raise ValueError("this layer is merged already: call unmerge() before you merge again")
        if hasattr(self.base, "dequantize"):
            raise ValueError(
                "the base is quantised and cannot hold a merged weight: replace it by a linear layer with the weight "
                "of base.dequantize() first, then merge"
            )
        merged = self.adapted_weight()
        self._unmerged = self.base_weight.clone()
        self.base_weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own weight back, bit for bit. Raises ValueError when nothing is merged."""
        if not self.merged:
            raise ValueError("this layer is not merged: there is nothing to take out")
        self.base_weight.copy_(self._unmerged)
        del self._unmerged
        self.merged = False

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, scaling={self.scaling:.4g}"


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, transformers' Conv1D included. Raises ValueError for others."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nx") and hasattr(module, "nf"):  # transformers.pytorch_utils.Conv1D
        return module.nx, module.nf
    raise ValueError(f"{type(module).__name__} is not a linear layer: LoRA needs in_features and out_features")


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out_features, in_features): dequantised, or Conv1D's transposed view."""
    if hasattr(module, "dequantize"):
        return module.dequantize()
    return module.weight.T if hasattr(module, "nf") else module.weight
