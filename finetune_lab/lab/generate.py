"""Greedy answers in batches: left padding, one cache, stop at the end of the turn.

What `model.generate` does with `do_sample=False`; kept here only for what every lesson repeats around it
(template, padding side, batches sorted by length, decoding). Leaves out: sampling, beams, streaming.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_lab.methods.chat import chat_format, render_chat, text_encoder


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the chat template's end of turn, and end of text."""
    return sorted({chat_format(tokenizer).end[-1], tokenizer.eos_token_id})


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    stops: Sequence[int] | None = None,
) -> list[list[int]]:
    """New token ids behind each row of token ids, without the stop token. The model's mode is put back.

    stops: the ids that end an answer, `stop_ids(tokenizer)` unless given.
    """
    training, stops = model.training, list(stops or stop_ids(tokenizer))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out: list[list[int]] = [[] for _ in rows]
    model.eval()
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        width = max(len(rows[i]) for i in chosen)
        ids = torch.tensor([[pad] * (width - len(rows[i])) + list(rows[i]) for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in chosen], device=model.device)
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            max_length=None,
            eos_token_id=stops,
            pad_token_id=pad,
        )
        for i, row in zip(chosen, made[:, width:].tolist(), strict=True):
            end = next((k for k, token in enumerate(row) if token in stops), len(row))
            out[i] = row[:end]
    model.train(training)
    return out


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The model's greedy answer to each prompt, a user's text or a list of messages, as text."""
    fmt, encode = chat_format(tokenizer), text_encoder(tokenizer)
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    rows = [render_chat(chat, fmt, encode, add_generation_prompt=True)[0] for chat in chats]
    made = complete(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return tokenizer.batch_decode(made, skip_special_tokens=True)
