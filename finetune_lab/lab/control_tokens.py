"""Control tokens that somebody typed: find them in a text, write them apart, or tokenise so that they stay text.

A control token (`<|end|>`, `<|im_start|>`) is one id that only the chat template may write. A tokenizer that is given a
whole conversation as one string cannot know who wrote which part, so a user who types the token gets its power.
Source of the safe way: `split_special_tokens=True` of transformers' tokenizers (`encode_special_tokens` in tokenizers).
"""

import re

from finetune_lab.errors import UserError
from finetune_lab.methods.chat import text_encoder

# What counts when no tokenizer is given: the shape of nearly all control tokens, and Gemma's.
CONTROL_SHAPE = re.compile(r"<\|[^<>|\s]{1,40}\|>|<(?:start|end)_of_turn>")


def control_tokens(text: str, tokenizer=None) -> list[tuple[int, str]]:
    """(position from 0, token) for each control token that tokenising `text` the usual way would give."""
    if tokenizer is None:
        return [(match.start(), match.group()) for match in CONTROL_SHAPE.finditer(text)]
    control = _control_ids(tokenizer)
    if not tokenizer.is_fast:
        ids = set(tokenizer(text, add_special_tokens=False)["input_ids"])
        return [(text.find(token), token) for i, token in control.items() if i in ids and token in text]
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = []
    for i, (start, stop) in zip(read["input_ids"], read["offset_mapping"], strict=True):
        # A rare character may give the unknown token: that is no injection, unless the token itself was typed.
        if i in control and (i != tokenizer.unk_token_id or text[start:stop].strip() == control[i]):
            found.append((start, control[i]))
    return found


def escape_control_tokens(text: str, tokenizer=None) -> str:
    """`text` with a space inside each control token, so that it is read as text and a person sees the change.

    Raises ValueError for a token that a space cannot break (a single character).
    """
    for _ in range(10):  # one pass is enough, except for tokens written inside tokens
        found = control_tokens(text, tokenizer)
        if not found:
            return text
        for start, token in reversed(found):  # from the back, so that the positions in front stay right
            start = text.find(token[0], start)  # some tokens swallow the spaces before them
            text = text[: start + 1] + " " + text[start + 1 :]
    raise ValueError(f"the control token {found[0][1]!r} cannot be broken by a space")


def encode_text_safely(tokenizer, text: str) -> list[int]:
    """Token ids of `text` with every character read as text: a control token typed by a user stays text.

    Raises UserError for a tokenizer that gives control tokens all the same (some slow ones ignore the setting).
    """
    ids = text_encoder(tokenizer)(text)
    control = _control_ids(tokenizer)
    for i in ids:
        if i in control and i != tokenizer.unk_token_id:
            raise UserError(
                f"This tokenizer reads {control[i]!r} inside text as a control token: use a fast tokenizer."
            )
    return ids


def _control_ids(tokenizer) -> dict[int, str]:
    """Control token id -> its text."""
    control = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return control | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
