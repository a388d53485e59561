"""What the arithmetic of a training step does to it: accumulation, right and wrong, and gradients in fp16.

The tiny model, fully fine-tuned on questions about towns. `mean_of_means` is the accumulation of older trainers
(transformers before 4.46): each micro batch divides by its own number of labelled tokens, and the step takes the mean.
Used by bench `sft_effects`. Leaves out: bf16, which needs no scale. Production: `num_items_in_batch` of
`transformers.Trainer`; `torch.amp.GradScaler`.
"""

import torch

from finetune_lab.lab import tasks, train
from finetune_lab.lab.models import load
from finetune_lab.methods import schedules
from finetune_lab.methods.loss_scaling import fp16_losses

ITEMS, LR, WARMUP = 500, 2e-4, 10


def curves_against_whole_batch(seed: int, steps: int) -> dict[str, float]:
    """Largest relative distance from the loss curve of 16 x 1: of 4 x 4, and of 4 x 4 with the mean of the means."""
    whole = curve(seed, steps, batch_size=16, accumulation=1)
    apart = {
        "4 x 4": curve(seed, steps, batch_size=4, accumulation=4),
        "4 x 4, mean of means": mean_of_means(seed, steps),
    }
    return {
        f"{name} against 16 x 1: largest distance": max(abs(a - b) / b for a, b in zip(losses, whole, strict=True))
        for name, losses in apart.items()
    }


def curve(seed: int, steps: int, batch_size: int, accumulation: int) -> list[float]:
    """The losses of a full fine-tuning on `batch_size * accumulation` items a step."""
    model, tokenizer = load("tiny", seed=seed)
    items = tasks.load_task("answer", "train", ITEMS, seed)
    rows = train.sft(
        model, tokenizer, items, steps=steps, batch_size=batch_size, accumulation=accumulation, lr=LR, warmup=WARMUP,
        seed=seed,
    )  # fmt: skip
    return [row["loss"] for row in rows]


def mean_of_means(seed: int, steps: int) -> list[float]:
    """`curve(seed, steps, 4, 4)` with the wrong accumulation: every micro batch weighs the same, however few its labels."""
    model, tokenizer = load("tiny", seed=seed)
    rows = train.encode(tokenizer, tasks.load_task("answer", "train", ITEMS, seed))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    model.train()
    for step, chosen in enumerate(train.batches(len(rows), 16, steps, seed)):
        optimizer.param_groups[0]["lr"] = LR * schedules.early_linear(step, steps, WARMUP)
        parts = [train.collate([rows[i] for i in chosen[k : k + 4]], tokenizer.pad_token_id) for k in range(0, 16, 4)]
        losses.append(0.0)
        for batch in parts:
            loss = model(**batch, use_cache=False).loss / len(parts)
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def half_precision(seed: int, steps: int) -> dict[str, float]:
    """`fp16_shares` of a batch of 16 before and after training, each at three scales of the loss."""
    items = tasks.load_task("answer", "train", ITEMS, seed)
    model, tokenizer = load("tiny", seed=seed)
    batch = train.collate(train.encode(tokenizer, items[:16]), tokenizer.pad_token_id)
    result = {}
    for when in ("base", "tuned"):
        if when == "tuned":
            train.sft(model, tokenizer, items, steps=steps, batch_size=16, lr=5e-4, seed=seed)
        exact = gradients(model, batch)
        for scale in (1, 2**10, 2**16):
            shares = fp16_shares(model, batch, exact, scale)
            result |= {f"{when}, loss scale {scale}, {what}": share for what, share in shares.items()}
    return result


def fp16_shares(model, batch: dict, exact: list[torch.Tensor], scale: float) -> dict[str, float]:
    """What fp16 does to the gradients of scale * loss: shares of those that are not 0 in `exact`, the fp32 ones.

    "cast": fp32 gradients rounded to fp16. "backward": the whole pass in fp16, where activations' gradients round, too.
    """
    half = load("tiny", dtype=torch.float16)[0]
    half.load_state_dict(model.state_dict())
    made = gradients(half, batch, scale)
    counted = sum(int((e != 0).sum()) for e in exact)
    zero = sum(int(((e != 0) & (h == 0)).sum()) for e, h in zip(exact, made, strict=True))
    broken = sum(int((~h.isfinite()).sum()) for h in made)
    return {f"cast: {what}": share for what, share in fp16_losses(exact, scale).items()} | {
        "backward: zero": zero / counted,
        "backward: infinite": broken / counted,
    }


def gradients(model, batch: dict, scale: float = 1.0) -> list[torch.Tensor]:
    """Gradients of scale * loss at every parameter, in the model's dtype."""
    model.train()
    loss = model(**batch, use_cache=False).loss
    return list(torch.autograd.grad(loss * scale, list(model.parameters())))
