"""LoRA, DoRA and merging in their shortest form: what lesson 03 asks for, and what the full versions are tested against.

Papers: LoRA 2106.09685, equation 3: h = W0 x + (alpha/r) B A x; DoRA 2402.09353, equation 5 and section 4.3.
Leaves out: everything around it (other kinds of layers, several adapters, switching, mixed dtypes): `lora`, `dora`
and `inject` have that.
In production: `peft.tuners.lora`.
"""

import math

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """base(x) + scaling * dropout(x) A^T B^T: a frozen nn.Linear and a trained update of rank r.

    A (r, in) starts uniform in +-1/sqrt(in), B (out, r) at zero; x is (..., in).
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        down = self.dropout(x) @ self.A.T
        return self.base(x) + self.scaling * (down @ self.B.T)


def merged_weight(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W0 + scaling * B A, added in fp32 and rounded once to the dtype of `weight` (out, in); changes nothing."""
    return (weight.float() + scaling * (B.float() @ A.float())).to(weight.dtype)


def dora_weight(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """m (W0 + dW) / ||W0 + dW||, row by row; the norm is a constant for autograd.

    weight and update are (out, in), magnitude is (out,).
    """
    direction = weight + update
    norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True).detach()
    return magnitude[:, None] * direction / norm
