"""Give a small model the outlier weights that large models have, without changing what it computes.

Row 0 of every up projection is divided by a factor, column 0 of the down projection behind it multiplied by the same:
the product of the two, and so every logit, stays (to rounding). SmoothQuant (arXiv 2211.10438) uses the same freedom to
remove outliers; here it plants them, so that quantisation meets on a toy what it meets on a real model.
Leaves out: MLPs without a gate (GPT-2), where a nonlinearity stands between the two.
"""

import torch
from torch import nn


@torch.no_grad()
def plant_outliers(model: nn.Module, factor: float) -> int:
    """Scale one hidden unit of every gated MLP of `model` in place; returns how many MLPs have an outlier now.

    Raises ValueError unless factor > 0.
    """
    if not factor > 0:
        raise ValueError(f"factor is {factor}: give a positive number, 20 makes weights about 20 times as large")
    planted = 0
    for mlp in model.modules():
        down, up = getattr(mlp, "down_proj", None), getattr(mlp, "up_proj", None)
        fused = getattr(mlp, "gate_up_proj", None)  # Phi-3: gate and up in one matrix, up is the lower half
        if down is None or (up is None and fused is None) or down.weight.dim() != 2:
            continue
        row = up.weight[0] if up is not None else fused.weight[fused.weight.shape[0] // 2]
        row /= factor
        down.weight[:, 0] *= factor
        planted += 1
    return planted
