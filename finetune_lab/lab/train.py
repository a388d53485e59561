"""Supervised fine-tuning in one readable loop: render, mask, pad, step. Nothing else is inside TRL's trainer.

AdamW, warm-up and decay, clipping, accumulation, weight decay; full fine-tuning or LoRA (peft) on all linear layers but
the head. With `schedule=schedules.linear, order=sampler_batches` it draws the loss curve of `trl.SFTTrainer`, step for
step (tests/parity/test_trl_curve.py). Leaves out: mixed precision, saving, evaluation, several devices.
Production: `trl.SFTTrainer`.
"""

import itertools
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_lab.errors import UserError
from finetune_lab.methods.chat import chat_format, completion_labels, render_chat, text_encoder
from finetune_lab.methods.loss import IGNORE_INDEX, labelled_only_loss, shift
from finetune_lab.methods.schedules import early_linear

Mask = str | Callable[[list, list], list]
Order = Callable[[int, int, int, int], Iterator[list[int]]]  # items, items a step, steps, seed -> indices of each step
Schedule = Callable[[int, int, int], float]  # step, steps, warmup -> share of the peak rate


def encode(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[dict], mask: Mask = "completion"
) -> list[tuple[list, list]]:
    """`(ids, labels)` of each prompt-completion item.

    mask: "completion" counts the answer, "all" every token but the first; or a function (prompt_ids, ids) -> labels.
    Raises UserError when the mask is unknown or an item is longer than the model's context.
    """
    masks = {"completion": completion_labels, "all": lambda prompt_ids, ids: list(ids)}
    labels_of = mask if callable(mask) else masks.get(mask)
    if labels_of is None:
        raise UserError(f"unknown mask {mask!r}: use 'completion' (only the answer counts), 'all' or a function")
    fmt, text = chat_format(tokenizer), text_encoder(tokenizer)
    rows = []
    for n, item in enumerate(items):
        prompt, _ = render_chat(item["prompt"], fmt, text, add_generation_prompt=True)
        ids, _ = render_chat([*item["prompt"], *item["completion"]], fmt, text)
        if len(ids) > tokenizer.model_max_length:
            raise UserError(
                f"item {n} has {len(ids)} tokens, the model's context is {tokenizer.model_max_length}: shorten it"
            )
        rows.append((ids, labels_of(prompt, ids)))
    return rows


def collate(rows: Sequence[tuple[list, list]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels`, each (batch, longest row)."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` lists of indices: every item once, in a new random order, before any comes again."""
    rng, left = random.Random(seed), []
    for _ in range(steps):
        while len(left) < batch_size:
            left += rng.sample(range(count), count)
        yield left[:batch_size]
        left = left[batch_size:]


def in_order(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The items as they stand, epoch after epoch: transformers' `train_sampling_strategy="sequential"`."""
    return _epochs(lambda _: list(range(count)), batch_size, steps)


def sampler_batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The order of transformers' random sampler: epoch e is `torch.randperm(count)` of a generator seeded `seed + e`.

    The last batch of an epoch is short when `batch_size` does not divide `count`.
    """
    return _epochs(
        lambda epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist(),
        batch_size,
        steps,
    )


def _epochs(order_of: Callable[[int], list[int]], batch_size: int, steps: int) -> Iterator[list[int]]:
    slices = (
        order[first : first + batch_size]
        for order in map(order_of, itertools.count())
        for first in range(0, len(order), batch_size)
    )
    return itertools.islice(slices, steps)


def add_lora(model: PreTrainedModel, rank: int, alpha: float | None = None, seed: int = 0):
    """A peft LoRA on all linear layers but the head, alpha = 2 rank unless given; A is drawn from `seed`."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # peft 0.21.2 reads `is_gradient_checkpointing`, which transformers 5.23 renamed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules="all-linear"))


def decay_groups(parameters: Sequence[torch.nn.Parameter], weight_decay: float) -> list[dict]:
    """AdamW's two groups: matrices decay, vectors (norms, biases) do not. transformers' rule gives the same for Llama."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int = 0,
    mask: Mask = "completion",
    warmup: int = 10,
    schedule: Schedule = early_linear,
    accumulation: int = 1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    order: Order = batches,
    collator: Callable[[list, int], dict[str, torch.Tensor]] = collate,
    groups: list[dict] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[dict]:
    """Train the parameters of `model` that want a gradient, in place; returns a row a step:
    step, loss, lr, grad_norm (before clipping), tokens (labelled ones), seconds.

    batch_size: sequences in memory at a time; a step takes `accumulation` such micro batches. Its loss is the mean over
    the labelled tokens of all of them, never the mean of their means. schedule: from `methods.schedules`.
    clip: largest norm of all gradients together, math.inf for no clipping. weight_decay: on matrices only.
    order: which items a step sees. collator(rows, pad): the tensors of one micro batch, labels among them.
    groups: AdamW's parameter groups, each with its own peak lr (LoRA+); the same warm-up and decay for all.
    on_step(step, loss) is called after each step, for bars and live curves.
    """
    rows = encode(tokenizer, items, mask)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups or decay_groups(trained, weight_decay), lr=lr, weight_decay=weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    torch.manual_seed(seed)
    history, began = [], time.perf_counter()
    model.train()
    for step, chosen in enumerate(order(len(rows), batch_size * accumulation, steps, seed)):
        parts = [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
        micros = [collator([rows[i] for i in part], pad) for part in parts]
        tokens = sum((shift(m["labels"], m["labels"])[1] != IGNORE_INDEX).sum() for m in micros)
        share = schedule(step, steps, warmup)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        loss = 0.0
        for micro in micros:
            inputs = {k: v.to(model.device) for k, v in micro.items()}
            labels = inputs.pop("labels")
            hidden = base.model(**inputs, use_cache=False)[0]
            part_loss = labelled_only_loss(hidden, base.lm_head.weight, labels, tokens.to(model.device))
            part_loss.backward()  # gradients add up until zero_grad
            loss += part_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"step": step, "loss": loss, "lr": lr * share, "grad_norm": norm.item(),
                        "tokens": tokens.item(), "seconds": time.perf_counter() - began})  # fmt: skip
        if on_step:
            on_step(step, loss)
    model.eval()
    return history
