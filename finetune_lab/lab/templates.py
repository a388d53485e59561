"""Chat templates that mark what the assistant says, so that a loss on assistant tokens only is possible.

TRL's `assistant_only_loss=True` and `apply_chat_template(..., return_assistant_tokens_mask=True)` need the marks
`{% generation %} ... {% endgeneration %}` in the template. Few models ship them; the tiny model does, SmolLM2 does not.
The marks change no character of the rendered text (a test compares), only the mask.
"""

import re

from finetune_lab.errors import UserError

# As shipped with SmolLM2-*-Instruct (ChatML with a default system message).
_SYSTEM = (
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
)
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SMOLLM2_SHIPPED = (
    "{% for message in messages %}" + _SYSTEM + "{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}" + _PROMPT
)
# The mark opens after the role line (the prompt ends there when we generate) and closes after <|im_end|>, the last
# token that the model has to write. The newline behind it is the template's and is not counted.
SMOLLM2_MARKED = (
    "{% for message in messages %}" + _SYSTEM + "{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + _PROMPT
)


def has_marks(template: str | None) -> bool:
    """True when the template marks assistant turns."""
    return bool(template) and re.search(r"\{%-?\s*generation\b", template) is not None


def training_template(tokenizer) -> str:
    """A chat template with generation marks that renders what the tokenizer's own template renders.

        tokenizer.chat_template = training_template(tokenizer)

    The tokenizer is not changed here. Templates that we do not know are looked up in TRL's collection.
    Raises UserError when there is no chat template, or none with marks is known for it.
    """
    own = tokenizer.chat_template
    if not own:
        raise UserError(
            "This tokenizer has no chat template: it belongs to a base model. Set one, or use an -Instruct model."
        )
    if isinstance(own, str) and has_marks(own):
        return own
    if own == SMOLLM2_SHIPPED:
        return SMOLLM2_MARKED
    from trl.chat_template_utils import get_training_chat_template  # slow to import, rarely needed

    try:
        return get_training_chat_template(tokenizer) or own
    except ValueError as error:
        raise UserError(
            "This tokenizer's chat template does not mark assistant turns, and TRL knows no marked copy of it. Put "
            "{% generation %} and {% endgeneration %} around the assistant's content, or use prompt-completion data."
        ) from error
