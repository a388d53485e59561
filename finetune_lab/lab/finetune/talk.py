"""Answers of the base model, the model with its adapter, the adapter that it began with, and the merged model.

    voices = load_voices(base="tiny", adapter="runs/x/adapter", which=("base", "adapter", "merged"))
    voices["adapter"](["My lamp is broken."], max_new_tokens=64)

`start` is the adapter that a run of preference training went on from, which is also its reference. The merged model is a copy, so that the others stay untouched. Greedy decoding: the same question gets the same answer.
Leaves out: sampling, streaming, many adapters in one batch (lesson 15).
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jinja2 import TemplateError
from peft import PeftModel

from finetune_lab.errors import UserError
from finetune_lab.lab import generate, models
from finetune_lab.lab.finetune.build import quiet_peft
from finetune_lab.lab.finetune.encode import turn_end
from finetune_lab.lab.finetune.runs import base_of, find_adapter, start_of
from finetune_lab.methods.chat import chat_format

Chat = list[dict[str, str]]
Voice = Callable[..., list[str]]
WHICH = ("base", "start", "adapter", "merged")


def answers(
    model, tokenizer, chats: Sequence[Chat | str], *, max_new_tokens: int = 64, batch_size: int = 32
) -> list[str]:
    """Greedy answers, with the same template as in training.

    Control tokens typed in a text stay text wherever `lab.generate` can render the template itself.
    """
    try:
        chat_format(tokenizer)
    except (ValueError, TemplateError):
        pass
    else:
        return generate.answer(model, tokenizer, chats, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if not tokenizer.chat_template:
        raise UserError("this model has no chat template, so it cannot be asked: use an -Instruct model.")
    chats = [[{"role": "user", "content": c}] if isinstance(c, str) else c for c in chats]
    rows = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]
    stops = sorted({turn_end(tokenizer), tokenizer.eos_token_id})
    made = generate.complete(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, stops=stops)
    return tokenizer.batch_decode(made, skip_special_tokens=True)


def load_voices(
    base: str | None, adapter: str | None = None, which: Sequence[str] = ("base",), dtype: torch.dtype = torch.float32
) -> dict[str, Voice]:
    """A function `(chats, max_new_tokens=...) -> answers` for each name in `which`.

    base: the model; None takes the one that the adapter names. Raises UserError when the two do not fit together.
    """
    if adapter is None and set(which) - {"base"}:
        raise UserError(f"{', '.join(w for w in which if w != 'base')} needs an adapter: give --adapter FOLDER.")
    base = model_of(base) if base else None
    place = find_adapter(adapter) if adapter else None
    start = start_of(adapter) if place and "start" in which else None
    if "start" in which and not start:
        raise UserError(f"{adapter} did not begin with an adapter (it is no `dpo --adapter` run): ask base instead.")
    if place and base and base != base_of(place):
        raise UserError(
            f"the adapter was trained on {base_of(place)}, not on {base}, and on another base its answers are silently "
            "wrong. If both are the same model, write that name into adapter_config.json."
        )
    model, tokenizer = models.load(base or (base_of(place) if place else None), dtype=dtype)
    if place is None:
        return {"base": _voice(model, tokenizer)}
    try:
        with quiet_peft():
            tuned = PeftModel.from_pretrained(model, place)
            if start:
                tuned.load_adapter(find_adapter(start), "start")
            tuned.eval()
    except (RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the adapter in {place} does not fit the model: {first[:200]}") from error
    voices = {}
    for name in which:
        if name == "base":
            voices[name] = _voice(tuned, tokenizer, tuned.disable_adapter)
        elif name == "start":
            voices[name] = _voice(tuned, tokenizer, functools.partial(_switched, tuned, "start"))
        elif name == "adapter":
            voices[name] = _voice(tuned, tokenizer)
        else:
            voices[name] = _voice(copy.deepcopy(tuned).merge_and_unload(), tokenizer)
    return voices


def model_of(path: str) -> str:
    """The model to load: the path itself, or `model` in the folder of a run. Raises UserError for a run's adapter."""
    folder = Path(path).expanduser()
    if path in models.KNOWN or (folder / "config.json").is_file():
        return path
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    if any((place / "adapter_config.json").is_file() for place in (folder, folder / "adapter")):
        raise UserError(f"{path} holds an adapter, not a model: use --adapter {path}.")
    return path


@contextlib.contextmanager
def _switched(tuned: PeftModel, name: str) -> Iterator[None]:
    """Speak with another adapter, then with the one from before."""
    before = tuned.active_adapter
    tuned.set_adapter(name)
    try:
        yield
    finally:
        tuned.set_adapter(before)


def _voice(model, tokenizer, around=contextlib.nullcontext) -> Voice:
    def voice(chats: Sequence[Chat | str], max_new_tokens: int = 64) -> list[str]:
        with around():
            return answers(model, tokenizer, chats, max_new_tokens=max_new_tokens)

    return voice
