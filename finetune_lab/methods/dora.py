"""DoRA: LoRA that learns the length of each row of the weight apart from its direction.

Paper: Liu et al. 2024, arXiv 2402.09353, equation 5: W' = m * (W0 + s B A) / ||W0 + s B A||, W0 not normalised first.
The norm is over the inputs: one magnitude a row of (out, in), as in the authors' code and in peft (the paper's
"columns" are those of the transpose). Section 4.3: the norm counts as a constant in the backward pass.
Leaves out: embeddings and convolutions. The faster form is `lora_fused`.
In production: `peft.LoraConfig(use_dora=True)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_lab.methods.lora import LoRALinear

SMALL = 1e-12  # a row of zeros (a pruned output, a padded vocabulary) has no direction: 0 / 0 without this, as in peft


class DoRALinear(LoRALinear):
    """`LoRALinear` with a trained magnitude (out_features,), which starts at the row norms of the base's weight.

    Arguments as in `LoRALinear`. Dropout as in peft: it thins the input of the base's share as well as LoRA's,
    all but the frozen layer's own output.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, **kwargs) -> None:
        super().__init__(base, r, alpha, dropout, **kwargs)
        self.magnitude = nn.Parameter(self.direction_norm())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features): x W'^T + bias, written as the base's output plus a change."""
        h = self.base(x)
        if not self.enabled or self.merged:
            return h
        x = x.to(self.A.dtype)
        if self.training and self.dropout.p > 0:
            x = self.dropout(x)
            frozen = F.linear(x, self.base_weight.to(x.dtype))
        else:
            frozen = h if getattr(self.base, "bias", None) is None else h - self.base.bias
        g = self.magnitude / self.direction_norm()  # (out,)
        update = F.linear(F.linear(x, self.A), self.B) * self.scaling
        return (h + (g - 1) * frozen + g * update).to(h.dtype)

    @torch.no_grad()
    def direction_norm(self) -> Tensor:
        """||W0 + s B A|| of each row, (out_features,), a constant for autograd (section 4.3)."""
        return torch.linalg.vector_norm(self.base_weight.to(self.A.dtype) + self.delta(), dim=1).clamp(min=SMALL)

    def adapted_weight(self) -> Tensor:
        """W' = m (W0 + s B A) / ||W0 + s B A||, rounded once to the base's dtype."""
        g = (self.magnitude / self.direction_norm())[:, None]
        return (g * (self.base_weight.to(self.A.dtype) + self.delta())).to(self.base_weight.dtype)
