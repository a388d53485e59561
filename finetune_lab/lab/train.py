"""Supervised fine-tuning in one readable loop: render, mask, pad, step.

What every lesson uses before lesson 05 puts TRL's trainer beside it: AdamW, linear warm-up and decay, clipping at 1,
full fine-tuning or LoRA (peft) on all linear layers but the head. Leaves out: accumulation, mixed precision, saving.
Production: `trl.SFTTrainer`.
"""

import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_lab.errors import UserError
from finetune_lab.methods.chat import chat_format, completion_labels, render_chat, text_encoder
from finetune_lab.methods.loss import labelled_only_loss

Mask = str | Callable[[list, list], list]


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


def add_lora(model: PreTrainedModel, rank: int, alpha: float | None = None, seed: int = 0):
    """A peft LoRA on all linear layers but the head, alpha = 2 rank unless given; A is drawn from `seed`."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # peft 0.21.2 reads `is_gradient_checkpointing`, which transformers 5.23 renamed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules="all-linear"))


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
    groups: list[dict] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[dict]:
    """Train the parameters of `model` that want a gradient, in place; returns a row a step: step, loss, lr, seconds.

    groups: AdamW's parameter groups, each with its own peak lr (LoRA+); the same warm-up and decay for all.
    on_step(step, loss) is called after each step, for bars and live curves.
    """
    rows = encode(tokenizer, items, mask)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups or trained, lr=lr, weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    torch.manual_seed(seed)
    history, began = [], time.perf_counter()
    model.train()
    for step, chosen in enumerate(batches(len(rows), batch_size, steps, seed)):
        batch = {k: v.to(model.device) for k, v in collate([rows[i] for i in chosen], pad).items()}
        share = min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1), 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        loss = labelled_only_loss(hidden, base.lm_head.weight, batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"step": step, "loss": loss.item(), "lr": lr * share, "seconds": time.perf_counter() - began})
        if on_step:
            on_step(step, history[-1]["loss"])
    model.eval()
    return history
