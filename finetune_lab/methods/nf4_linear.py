"""A linear layer whose weight is stored in NF4: the base layer of QLoRA.

Paper: QLoRA (Dettmers et al. 2023, arXiv 2305.14314, eq. 5 and 6). Formula: y = x dequantize(W)^T + b; in backward
dL/dx = dL/dy dequantize(W), the weight restored a second time. No gradient for W: it is frozen, and codes have none.
Autograd saves the packed weight only, so that the restored one (8 times larger in fp32) dies within the layer.
Leaves out: fused kernels (bitsandbytes' gemv for one token), FSDP storage dtypes. In production: `bnb.nn.Linear4bit`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_lab.methods.blockwise import Scales
from finetune_lab.methods.nf4 import Quantized, dequantize, quantize


class NF4Linear(nn.Module):
    """`nn.Linear` with its weight in 4 bits, frozen. Make one with `NF4Linear.from_linear(linear)`.

    weight (the packed codes) and scales are buffers: `state_dict` holds them, `.to(device)` moves them. A LoRA layer on
    top (lesson 03's `LoRALinear(base=...)`) is QLoRA: it needs `in_features`, `out_features` and `forward` only.
    """

    def __init__(self, q: Quantized, bias: nn.Parameter | None = None, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.blocksize, self.dtype, self.compute_dtype = q.blocksize, q.dtype, compute_dtype
        self.register_buffer("packed", q.packed)
        self.register_buffer("code", q.code)
        double = isinstance(q.absmax, Scales)
        self.register_buffer("absmax", q.absmax.absmax if double else q.absmax)
        self.register_buffer("absmax_codes", q.absmax.codes if double else None)
        self.register_buffer("absmax_offset", q.absmax.offset if double else None)
        self.bias = bias

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> "NF4Linear":
        """Quantise a linear layer's weight (out, in). compute_dtype: of the matrix product; None takes the input's."""
        q = quantize(linear.weight, blocksize=blocksize, double_quant=double_quant)
        return cls(q, linear.bias, compute_dtype)

    @property
    def quantized(self) -> Quantized:
        """The weight as it is stored: its bytes are `quantized.nbytes`."""
        absmax = self.absmax
        if self.absmax_codes is not None:
            absmax = Scales(self.absmax_codes, self.absmax, self.absmax_offset, 256)
        shape = torch.Size([self.out_features, self.in_features])
        return Quantized(self.packed, absmax, shape, self.dtype, self.blocksize, self.code)

    def dequantize(self) -> Tensor:
        """The weight that the layer computes with, (out, in), in the dtype it came in: what an adapter is merged into."""
        return dequantize(self.quantized)

    def forward(self, x: Tensor) -> Tensor:
        compute = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(compute)
        return NF4Function.apply(x.to(compute), self.quantized, bias).to(x.dtype)

    def _apply(self, fn, recurse: bool = True) -> "NF4Linear":
        """`.to(torch.bfloat16)` on a whole model must not round the scales and the levels: they move, but stay fp32."""
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, blocksize={self.blocksize}"


class NF4Function(torch.autograd.Function):
    """x (..., in) @ dequantize(W) (out, in)^T + b. Keeps the packed weight for backward; neither x nor the restored W."""

    @staticmethod
    def forward(ctx, x: Tensor, q: Quantized, bias: Tensor | None) -> Tensor:
        ctx.q = q
        return F.linear(x, dequantize(q).to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y: Tensor):
        wants_x, _, wants_bias = ctx.needs_input_grad
        grad_x = grad_y @ dequantize(ctx.q).to(grad_y.dtype) if wants_x else None
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if wants_bias else None
        return grad_x, None, grad_bias
