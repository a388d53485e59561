"""What is trained, and how fast each part of it: a report, and the parameter groups of LoRA+.

Paper: LoRA+, Hayou et al. 2024, arXiv 2402.12354: with one learning rate for A and B, wide models learn their features
inefficiently; B should learn `ratio` times faster.
Leaves out: peft's own learning rate for adapted embeddings. Works on any model, adapters or not.
In production: `PeftModel.print_trainable_parameters`, `peft.optimizers.create_loraplus_optimizer`.
"""

from torch import nn


def trainable_report(model: nn.Module) -> dict:
    """What the optimizer will see: numbers `trainable`, `total`, their `share`, `bytes` of the trained parameters.

    `by_name`: trained parameters for each kind of layer (`q_proj`, ...). Shared parameters count once.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in model.parameters())
    by_name: dict[str, int] = {}
    for name, p in trained.items():
        kind = name.split(".")[-2] if "." in name else name
        by_name[kind] = by_name.get(kind, 0) + p.numel()
    count = sum(by_name.values())
    return {
        "trainable": count,
        "total": total,
        "share": count / total,
        "bytes": sum(p.numel() * p.element_size() for p in trained.values()),
        "by_name": by_name,
    }


def loraplus_groups(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    """Parameter groups for any optimizer: A (and other matrices) at `lr`, B and vectors at `lr * ratio`.

    LoRA+ suggests a ratio of about 2^4 to start from; it depends on task and model. As peft's
    `create_loraplus_optimizer`, DoRA's magnitudes included; without its group for embeddings.
    """
    slow, fast = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (fast if name.rpartition(".")[2] == "B" or p.ndim == 1 else slow).append(p)
    groups = [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return [group | {"weight_decay": weight_decay} for group in groups]
