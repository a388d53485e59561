"""Loss scaling: keep small gradients alive in fp16 by multiplying the loss, and divide before the optimizer's step.

Paper: Micikevicius et al. 2018, Mixed Precision Training, arXiv 1710.03740, section 3.2.
Formula: backward(S * loss) gives S * g in fp16; g = (S * g) / S in fp32. fp16 keeps 2^-24 (6e-8) to 65504; what is below
half of the smallest becomes 0, what is above the largest becomes inf. bf16 has the exponents of fp32 and needs none of this.
S is static, or dynamic: halve it and skip the step when an inf or nan shows; double it after `interval` good steps.
Leaves out: several devices, several optimizers. Production: `torch.amp.GradScaler`, `SFTConfig(fp16=True)`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class DynamicScaler:
    """The scale S and its rule, as `torch.amp.GradScaler` has it. A static scale is `growth=1, backoff=1`."""

    scale: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    good_steps: int = field(default=0, init=False)

    def update(self, overflow: bool) -> None:
        """After every step: shrink after an overflow, grow after `interval` steps in a row without one."""
        if overflow:
            self.scale, self.good_steps = self.scale * self.backoff, 0
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.scale, self.good_steps = self.scale * self.growth, 0


def unscale_(parameters: Iterable[torch.nn.Parameter], scale: float) -> bool:
    """Divide the gradients by `scale` in place; True when one of them was inf or nan: then skip the optimizer's step.

    Clip after this, never before: a norm limit of 1 would act on gradients that are `scale` times too large.
    """
    overflow = False
    for p in parameters:
        if p.grad is not None:
            overflow = overflow or not p.grad.isfinite().all().item()
            p.grad.div_(scale)
    return overflow


def fp16_losses(tensors: Iterable[Tensor], scale: float = 1.0) -> dict[str, float]:
    """What fp16 does to the nonzero entries of fp32 `tensors`, multiplied by `scale` first: shares of all of them.

    zero: lost altogether; subnormal: kept with fewer than 11 bits; infinite: above 65504. All 0 is a harmless scale.
    Raises ValueError when there is no nonzero entry.
    """
    counts = {"zero": 0, "subnormal": 0, "infinite": 0}
    total = 0
    for tensor in tensors:
        values = tensor[tensor != 0].float()
        half = (values * scale).half()
        size = half.float().abs()
        total += values.numel()
        counts["zero"] += int((size == 0).sum())
        counts["subnormal"] += int(((size > 0) & (size < torch.finfo(torch.float16).tiny)).sum())
        counts["infinite"] += int(size.isinf().sum())
    if total == 0:
        raise ValueError("no nonzero entry in the tensors: run backward first, and give gradients, not weights")
    return {name: count / total for name, count in counts.items()}
