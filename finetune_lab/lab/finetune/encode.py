"""From rows to token ids and labels, exactly as `trl.SFTTrainer` prepares them, and the mask made visible.

    completion   labels[t] = ids[t] behind the common prefix of prompt and prompt + completion, else -100
    assistant    labels[t] = ids[t] where the template's {% generation %} marks are
    all          labels = ids

The trainer is given these rows (TRL takes `input_ids` and `labels` as they are), so what the preflight shows is what is
trained on, and nothing is cut or dropped without a word. A test compares each row with TRL's own preparation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from finetune_lab.errors import UserError
from finetune_lab.lab.templates import training_template
from finetune_lab.methods.chat import IGNORE_INDEX, completion_labels


@dataclass(frozen=True)
class Example:
    """One row, ready to train on. `cut`: tokens lost behind max_length; `lost`: labelled ones among them."""

    ids: list[int]
    labels: list[int]
    cut: int = 0
    lost: int = 0

    @property
    def counted(self) -> int:
        """Tokens that count in the loss. The first token of a row is never predicted, so it never counts."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence in this row."""
        return len(self.ids)


def encode(row: dict, tokenizer, loss: str, template: str | None = None) -> Example:
    """One row with its labels. loss: completion, assistant or all; template: with marks, for assistant.

    Raises UserError when the template refuses the row, or the loss does not fit the row's format.
    """
    if loss == "completion" and "prompt" not in row:
        raise UserError(
            "loss is 'completion' but the rows are messages: use loss 'assistant', or prompt and completion."
        )
    turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    if loss == "assistant":
        read = render(tokenizer, turns, chat_template=template, return_assistant_tokens_mask=True)
        ids, marks = read["input_ids"], read["assistant_masks"]
        return Example(ids, [i if m else IGNORE_INDEX for i, m in zip(ids, marks, strict=True)])
    ids = render(tokenizer, turns)["input_ids"]
    if loss == "all":
        return Example(ids, list(ids))
    return Example(
        ids, completion_labels(render(tokenizer, row["prompt"], add_generation_prompt=True)["input_ids"], ids)
    )


def render(tokenizer, turns: list[dict], **how) -> dict:
    """What the chat template makes of a conversation: `input_ids`, and masks where asked for. Raises UserError."""
    if not tokenizer.chat_template and not how.get("chat_template"):
        raise UserError(
            "this model has no chat template (a base model?): use an -Instruct model, or give it a template."
        )
    try:
        # verbose: transformers warns of texts longer than the model, and ours are cut (and said to be) later
        return tokenizer.apply_chat_template(turns, return_dict=True, tokenizer_kwargs={"verbose": False}, **how)
    except (TemplateError, ValueError) as error:
        raise UserError(f"the model's chat template refuses this data: {error}") from error


def encode_all(rows: Sequence[dict], tokenizer, loss: str, max_length: int) -> list[Example]:
    """Every row, cut to max_length tokens (the end is lost, as in TRL's keep_start); nothing is dropped here."""
    template = training_template(tokenizer) if loss == "assistant" else None
    return [shortened(encode(row, tokenizer, loss, template), max_length) for row in rows]


def shortened(whole: Example, max_length: int) -> Example:
    """An example cut to max_length tokens, which knows what it has lost."""
    lost = sum(label != IGNORE_INDEX for label in whole.labels[max_length:])
    cut = max(0, len(whole.ids) - max_length)
    return Example(whole.ids[:max_length], whole.labels[:max_length], cut, lost)


def turn_end(tokenizer) -> int:
    """The id that ends an assistant's turn in the chat template: the first special token behind the text, else eos."""
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Zq"}, {"role": "assistant", "content": "Xw"}], tokenize=False
    )
    ending = tokenizer.encode(said.rsplit("Xw", 1)[1], add_special_tokens=False)
    return next((i for i in ending if i in tokenizer.all_special_ids), tokenizer.eos_token_id)


def preview(example: Example, tokenizer, opening: str = "[[", closing: str = "]]") -> str:
    """The text of an example with the part that counts in the loss between the two marks."""
    out, inside, run = [], False, []
    for i, label in [*zip(example.ids, example.labels, strict=True), (None, IGNORE_INDEX)]:
        counts = label != IGNORE_INDEX
        if i is None or counts != inside:
            out.append(tokenizer.decode(run))
            out.append((opening if counts else closing) if counts != inside else "")
            run, inside = [], counts
        run.append(i)
    return "".join(out)
