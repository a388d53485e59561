"""AdamW whose two moments take one byte each: blocks of 256, dynamic code.

Paper: 8-bit Optimizers via Block-wise Quantization (Dettmers et al. 2022, arXiv 2110.02861, section 2); AdamW is
1711.05101. Formula: restore m and v, update both and the parameter in fp32 as AdamW does, quantise m and v again.
State: 2 bytes a parameter and 8 / 256 for the scales, instead of 8. A parameter of fewer than 4096 numbers keeps fp32
states, as in bitsandbytes: biases and norms are small and sensitive.
Leaves out: amsgrad, paging (see paging.py), per-layer overrides, embeddings' stable form.
In production: `bitsandbytes.optim.AdamW8bit`.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from finetune_lab.methods.blockwise import dequantize_blockwise, quantize_blockwise

SMALL = 4096


def moment_bytes(parameters: int) -> int:
    """Bytes of both moments of one parameter tensor: a byte each and two fp32 scales a block of 256; fp32 when small."""
    return 8 * parameters if parameters < SMALL else 2 * parameters + 8 * -(-parameters // 256)


class AdamW8bit(torch.optim.Optimizer):
    """Block-wise 8-bit AdamW. Equal to bitsandbytes' CPU build to the bit in states and parameters.

    Raises ValueError for a negative lr, eps or weight_decay and for betas outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}: each must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns what `closure` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _update(p, self.state[p], group["lr"], group["betas"], group["eps"], group["weight_decay"])
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but codes stay bytes and scales fp32: torch 2.13 casts every state to the parameter's dtype."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for index, kept in state_dict["state"].items():
            p = params[index]
            self.state[p] = {k: v.to(p.device).clone() if isinstance(v, Tensor) else v for k, v in kept.items()}

    def state_bytes(self) -> int:
        """Bytes of all moments and their scales."""
        return sum(v.nbytes for state in self.state.values() for v in state.values() if isinstance(v, Tensor))


def _update(p: Tensor, state: dict, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    beta1, beta2 = betas
    m, v = _restore(p, state)
    state["step"] = step = state.get("step", 0) + 1
    grad = p.grad.float()
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    weights = p.float().mul_(1 - lr * weight_decay)
    denominator = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    p.copy_(weights.addcdiv_(m, denominator, value=-lr / (1 - beta1**step)))
    _keep(state, m, v)


def _restore(p: Tensor, state: dict) -> tuple[Tensor, Tensor]:
    """Both moments in fp32: zeros at the first step."""
    if not state:
        return torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32)
    if "absmax1" not in state:
        return state["m"], state["v"]
    return (
        dequantize_blockwise(state["m"], state["absmax1"]),
        dequantize_blockwise(state["v"], state["absmax2"], signed=False),
    )


def _keep(state: dict, m: Tensor, v: Tensor) -> None:
    if m.numel() < SMALL:
        state["m"], state["v"] = m, v
        return
    state["m"], state["absmax1"] = quantize_blockwise(m)
    state["v"], state["absmax2"] = quantize_blockwise(v, signed=False)
