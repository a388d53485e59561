"""Chat templates and labels: from a list of messages to token ids, and to the ids that are counted in the loss.

What: render a conversation with role marks, remember which tokens each role said, build the labels of supervised
fine-tuning (SFT). Paper: Ouyang et al. 2022, InstructGPT (arXiv 2203.02155); loss over the response only as in
Alpaca and TRL.
Formula: labels[t] = ids[t] if token t counts, else -100. Labels are NOT shifted: the loss shifts them.
Leaves out: tool calls, images, templates whose turns end differently for each role (Llama-2, Mistral).
In production: `tokenizer.apply_chat_template(..., return_assistant_tokens_mask=True)` and `trl.SFTTrainer`.
"""

from collections.abc import Callable
from dataclasses import dataclass

IGNORE_INDEX = -100  # the label that torch's cross_entropy skips by default


@dataclass(frozen=True)
class ChatFormat:
    """The token ids that a chat template puts around the texts of a conversation.

    begin:           at the very start, when the first message is a system message (often one id: bos)
    begin_default:   at the very start otherwise; some templates put a default system message here
    before[role]:    in front of the text: the role mark
    end:             behind the text of every role, the end-of-turn token last
    gap:             behind the end-of-turn token (ChatML: a newline; often nothing)
    """

    begin: tuple[int, ...]
    begin_default: tuple[int, ...]
    before: dict[str, tuple[int, ...]]
    end: tuple[int, ...]
    gap: tuple[int, ...] = ()


def text_encoder(tokenizer) -> Callable[[str], list[int]]:
    """Return `encode(text) -> ids` that reads every character as text: '<|end|>' written by a user stays text.

    Source: `tokenizers.Tokenizer.encode_special_tokens`, in transformers `split_special_tokens=True`.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    return encode


def chat_format(tokenizer) -> ChatFormat:
    """Read the format of a tokenizer's own chat template by rendering it around two marker texts.

    Raises ValueError for a template that this module cannot express (no template, turns that end differently).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template: set tokenizer.chat_template first")
    ask, reply = "Zq", "Xw"  # marker texts that no template holds

    def render(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    begin_default, between = render(("user", ask), ("assistant", reply)).split(reply)[0].split(ask)
    ending = render(("user", ask)).split(ask)[1]
    begin, after_system = render(("system", reply), ("user", ask)).split(ask)[0].split(reply)
    mark_assistant = between.removeprefix(ending)
    mark_user = after_system.removeprefix(ending)
    mark_system = render(("user", ask), ("system", reply)).split(ask)[1].removeprefix(ending).split(reply)[0]
    if not between.startswith(ending) or not after_system.startswith(ending):
        raise ValueError(f"the turns of this chat template do not all end with {ending!r}: write a ChatFormat by hand")

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    turn_end = ids(ending)
    stop = next((i + 1 for i, token in enumerate(turn_end) if token in tokenizer.all_special_ids), len(turn_end))
    return ChatFormat(
        begin=ids(begin.removesuffix(mark_system)),
        begin_default=ids(begin_default.removesuffix(mark_user)),
        before={"system": ids(mark_system), "user": ids(mark_user), "assistant": ids(mark_assistant)},
        end=turn_end[:stop],
        gap=turn_end[stop:],
    )


def render_chat(
    messages: list[dict], fmt: ChatFormat, encode: Callable, add_generation_prompt: bool = False
) -> tuple[list[int], list[tuple]]:
    """Turn messages into token ids, and note where each role speaks.

    messages: dicts with 'role' and 'content'; encode: text -> ids that treats special tokens as text (`text_encoder`).
    add_generation_prompt: end with the assistant's mark, so that the model answers next.
    Returns (ids, spans). A span is (role, start, stop): ids[start:stop] is a message's text and its end-of-turn token,
    without the role mark. Raises ValueError for a role that the format has no mark for.
    """
    unknown = {message["role"] for message in messages} - set(fmt.before)
    if unknown:
        raise ValueError(f"unknown role {min(unknown)!r}: this format knows {sorted(fmt.before)}")
    has_system = len(messages) > 0 and messages[0]["role"] == "system"
    ids = list(fmt.begin if has_system else fmt.begin_default)
    spans = []
    for message in messages:
        ids += fmt.before[message["role"]]
        start = len(ids)
        ids += encode(message["content"])
        ids += fmt.end
        spans.append((message["role"], start, len(ids)))
        ids += fmt.gap
    if add_generation_prompt:
        ids += fmt.before["assistant"]
    return ids, spans


def completion_labels(prompt_ids: list[int], ids: list[int]) -> list[int]:
    """Labels for one prompt and its completion: the prompt is masked, every token behind it counts.

    prompt_ids: the prompt alone, with its generation prompt; ids: prompt and completion together.
    The completion starts where the two part, as in TRL: a tokenizer may merge characters across the boundary, so
    that len(prompt_ids) is not always the place. Returns len(ids) labels, not shifted.
    """
    start = 0
    while start < min(len(prompt_ids), len(ids)) and prompt_ids[start] == ids[start]:
        start += 1
    return [IGNORE_INDEX] * start + ids[start:]


def assistant_labels(ids: list[int], spans: list[tuple]) -> list[int]:
    """Labels for a conversation of many turns: what the assistant said counts, each end-of-turn token included.

    Equal to TRL's `assistant_only_loss=True` on a template whose {% generation %} block ends with that token.
    Returns len(ids) labels, not shifted.
    """
    labels = [IGNORE_INDEX] * len(ids)
    for role, start, stop in spans:
        if role == "assistant":
            labels[start:stop] = ids[start:stop]
    return labels
