"""LoRA and DoRA forward and backward by hand: the same function as `lora` and `dora`, near the cost of the frozen layer.

What is saved, against the plain form: the update is added into the output in place; only thin matrices are cast, never
an activation; the backward pass keeps x, x A^T and, for DoRA, one more activation. DoRA's norm needs no (out, in)
temporary, since ||W||^2 is known from the start:
    ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) . b + s^2 (b A A^T) . b       for each row w of W0 and b of B.
What no code can avoid is in `lora_time_floor` and `dora_time_floor`.
Leaves out: autocast, second derivatives. Dropout, quantised and trained bases take the plain form.
In production: Unsloth's Triton kernels (LoRA only); peft runs the plain form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_lab.methods.dora import SMALL, DoRALinear
from finetune_lab.methods.lora import LoRALinear

TINY = 1e-20  # stands for a magnitude of exactly zero


class FusedLoRALinear(LoRALinear):
    """`LoRALinear` with a hand-written backward pass: same arguments, same function.

    Products with A and B run in the dtype of x; their gradients come back in the dtype of A. On a bf16 base that
    rounds x A^T to bf16, where the plain form casts x to fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not _fits(self, x):
            return super().forward(x)
        return _LoRA.apply(x, self.base_weight, getattr(self.base, "bias", None), self.A, self.B, self.scaling)


class FusedDoRALinear(DoRALinear):
    """`DoRALinear` with a hand-written backward pass and a norm without temporaries: same arguments, same function."""

    _square_of: tuple | None = None  # which weight `_square` belongs to

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not _fits(self, x):
            return super().forward(x)
        bias = getattr(self.base, "bias", None)
        norm = self.direction_norm()
        return _DoRA.apply(x, self.base_weight, bias, self.A, self.B, self.magnitude, norm, self.scaling)

    @torch.no_grad()
    def direction_norm(self) -> Tensor:
        """||W0 + s B A|| of each row, (out_features,), from three thin products and the cached ||W0||^2."""
        weight, s = self.base_weight, self.scaling
        B_t = self.B.T
        cross = (self.A.to(weight.dtype) @ weight.T).to(B_t.dtype)  # (r, out)
        cross.addmm_(self.A @ self.A.T, B_t, alpha=s / 2)
        return cross.mul_(B_t).sum(0).mul_(2 * s).add_(self._weight_square(weight)).clamp_(min=SMALL**2).sqrt_()

    def _weight_square(self, weight: Tensor) -> Tensor:
        """||W0||^2 of each row, computed once for each content of the weight (a load or a merge makes another)."""
        now = (weight.data_ptr(), weight._version, weight.device, self.A.dtype)
        if self._square_of != now:
            self._square = torch.linalg.vector_norm(weight, dim=1, dtype=self.A.dtype).square()
            self._square_of = now
        return self._square


def lora_time_floor(width: int, r: int) -> float:
    """Least time of LoRA over its frozen (width, width) layer, forward and backward: products with A and B, 1 + 3r/d.

    The frozen layer makes two products of N d^2 multiplications (output, gradient of x), LoRA six thin ones of N d r.
    """
    return 1 + 6 * r / (2 * width)


def dora_time_floor(width: int, r: int, tokens: int) -> float:
    """Least time of DoRA over the frozen layer: LoRA's, and W A^T for the norm (r d^2), once a step: r / 2N more."""
    return lora_time_floor(width, r) + r / (2 * tokens)


def _fits(layer: LoRALinear, x: Tensor) -> bool:
    """Whether the hand-written pass computes this call: adapter on, no dropout, a float base that stays frozen."""
    if (
        not layer.enabled
        or layer.merged
        or (layer.training and layer.dropout.p > 0)
        or hasattr(layer.base, "dequantize")
    ):
        return False
    return x.dtype == layer.base.weight.dtype and not layer.base.weight.requires_grad


class _LoRA(torch.autograd.Function):
    """y = x W^T + bias + s x A^T B^T."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        rows, a, b_t = _thin(x, A, B)
        down = F.linear(rows, a).mul_(s)  # (N, r)
        y = F.linear(x, weight, bias)
        y.view(-1, len(weight)).addmm_(down, b_t)
        ctx.save_for_backward(rows, weight, a, b_t, down)
        ctx.s, ctx.shape, ctx.dtype = s, x.shape, A.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        grad_x, grad_A, grad_B = _backward(ctx, grad.reshape(-1, grad.shape[-1]), *ctx.saved_tensors)
        return grad_x, None, None, grad_A, grad_B, None


class _DoRA(torch.autograd.Function):
    """y = g * z + bias with z = x W^T + s x A^T B^T, g = m / norm and the norm a constant.

    Since d y / d m = z / norm = g z / m, the gradient of m needs no z: the output without its bias is enough.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, m: Tensor, norm: Tensor, s: float) -> Tensor:
        rows, a, b_t = _thin(x, A, B)
        m = torch.where(m == 0, TINY, m)  # else g z would forget z, and m would never leave zero
        g = (m / norm).to(x.dtype)
        down = F.linear(rows, a).mul_(s)  # (N, r)
        y = F.linear(x, weight)
        y.view(-1, len(weight)).addmm_(down, b_t)
        y.mul_(g)
        ctx.save_for_backward(rows, weight, a, b_t, down, y, g, m)
        ctx.s, ctx.shape, ctx.dtype = s, x.shape, A.dtype
        return y if bias is None else y + bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        *saved, y, g, m = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        product = grad * y.view(grad.shape)
        grad_m = product.sum(0).to(m.dtype).div_(m)
        grad_z = torch.mul(grad, g, out=product)  # the same memory again
        grad_x, grad_A, grad_B = _backward(ctx, grad_z, *saved)
        return grad_x, None, None, grad_A, grad_B, grad_m, None, None


def _thin(x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as (N, in); A (r, in) and B^T (r, out) in its dtype, contiguous: the matrix products like that best."""
    return x.reshape(-1, x.shape[-1]), A.to(x.dtype), B.T.to(x.dtype).contiguous()


def _backward(ctx, grad: Tensor, rows: Tensor, weight: Tensor, a: Tensor, b_t: Tensor, down: Tensor):
    """Gradients of x, A and B for grad (N, out) at x W^T + s x A^T B^T; few calls, each costs as much as a thin product."""
    grad_B = (down.T @ grad).to(ctx.dtype).T  # 5 times faster than grad.T @ down
    grad_down = F.linear(grad, b_t).mul_(ctx.s)  # (N, r)
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad @ weight).addmm_(grad_down, a).view(ctx.shape)
    grad_A = (grad_down.T @ rows).to(ctx.dtype)
    return grad_x, grad_A, grad_B
