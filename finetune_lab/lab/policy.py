"""What a policy says when it samples, and how far it has moved from its reference.

What: sampled answers (temperature 1 by default, nothing cut off), and KL(pi || ref) in nats an answer.
Formula: KL = E over y ~ pi of sum_t KL(pi(. | x, y_<t) || ref(. | x, y_<t)): texts are sampled, the next token is not.
Same mean as E[log pi(y) - log ref(y)], less noise, and never negative.
Leaves out: top-k, top-p. Production: `model.generate(do_sample=True)`; TRL logs `objective/kl` in its online trainers.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_lab.errors import UserError
from finetune_lab.lab.generate import stop_ids
from finetune_lab.methods.chat import chat_format, render_chat, text_encoder
from finetune_lab.methods.packing import pad_rows


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    n: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[str]]:
    """`n` sampled answers to each prompt (a user's text or a list of messages), as text; the same seed, the same texts."""
    _, rows = sample_ids(
        model, tokenizer, prompts, n=n, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [texts[i * n : (i + 1) * n] for i in range(len(prompts))]


@torch.no_grad()
def sample_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    n: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each prompt, n times in a row, and of the answer sampled to it, its stop token included."""
    fmt, encode, stops = chat_format(tokenizer), text_encoder(tokenizer), stop_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    heads = [render_chat(chat, fmt, encode, add_generation_prompt=True)[0] for chat in chats for _ in range(n)]
    order = sorted(range(len(heads)), key=lambda i: len(heads[i]))
    answers: list[list[int]] = [[] for _ in heads]
    training = model.training
    model.eval()
    torch.manual_seed(seed)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        ids, mask = pad_rows([heads[i] for i in chosen], pad, side="left")
        made = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, top_k=0, top_p=1.0,
            temperature=temperature, max_new_tokens=max_new_tokens, max_length=None, eos_token_id=stops,
            pad_token_id=pad,
        )  # fmt: skip
        for i, row in zip(chosen, made[:, ids.shape[1] :].tolist(), strict=True):
            answers[i] = row[: next((k + 1 for k, token in enumerate(row) if token in stops), len(row))]
    model.train(training)
    return heads, answers


@torch.no_grad()
def kl_to_reference(
    model: PreTrainedModel,
    reference: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    n: int = 1,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, float]:
    """KL(pi || ref) over answers sampled from `model`: mean in nats an answer (`kl`), its standard error, the answers.

    reference: another model, or "adapter off" for a peft model. Unbiased up to answers cut at max_new_tokens.
    """
    if reference == "adapter off" and not hasattr(model, "disable_adapter"):
        raise UserError('reference="adapter off" needs a peft model: give the reference model itself')
    heads, answers = sample_ids(model, tokenizer, prompts, n=n, max_new_tokens=max_new_tokens, seed=seed)
    kls = []
    for first in range(0, len(heads), batch_size):
        batch = slice(first, first + batch_size)
        policy = _answer_logps(model, heads[batch], answers[batch])
        without = model.disable_adapter() if reference == "adapter off" else nullcontext()
        with without:
            past = _answer_logps(model if reference == "adapter off" else reference, heads[batch], answers[batch])
        each = (policy.exp() * (policy - past)).sum(-1)  # (answer tokens of the batch,)
        kls += [part.sum() for part in each.split([len(answer) for answer in answers[batch]])]
    values = torch.stack(kls)
    return {"kl": values.mean().item(), "standard_error": (values.std() / len(values) ** 0.5).item(), "n": len(values)}


def _answer_logps(model: PreTrainedModel, heads: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Log-probabilities of every next token at every answer token of the rows, one after another, (tokens, vocab)."""
    training = model.training
    model.eval()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, mask = pad_rows([head + answer for head, answer in zip(heads, answers, strict=True)], 0)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    hidden = base.model(**inputs, use_cache=False)[0]
    rows = zip(hidden, heads, answers, strict=True)
    states = torch.cat([states[len(head) - 1 : len(head) - 1 + len(answer)] for states, head, answer in rows])
    model.train(training)
    return base.lm_head(states).float().log_softmax(-1)
