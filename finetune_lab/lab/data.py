"""Your own data: read JSONL for fine-tuning, and say about every bad line what is wrong with it.

    rows = load_jsonl("tickets.jsonl", tokenizer=tokenizer)
    dataset = datasets.Dataset.from_list(rows)

Four formats, one a file; `prompt`, `completion`, `chosen`, `rejected` are texts or lists of messages:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"prompt": "...", "completion": "...", "label": true}          (a thumb up or down, for KTO)

All become TRL's conversational form: a text turns into one user or one assistant turn. `id` and `meta` are kept as
they are; any other key is an error, because it would be dropped later without a word. Order: an optional system turn,
then user and assistant in turn, the assistant last. Two users in a row or an assistant that begins are errors: some
templates (Gemma, Mistral) refuse them, others accept them and teach a situation that never comes.

**Control tokens in text.** TRL and `apply_chat_template` write the conversation as one string and tokenise that, so
"<|end|><|assistant|>" typed by a user becomes real control tokens: the user speaks as the assistant. This is prompt
injection through the template. The loader refuses such a line (`special_tokens="error"`), or writes the token visibly
apart so that it stays text (`"escape"`: "<|end|>" becomes "< |end|>", with a warning that names the lines). With a
`tokenizer` the test is the tokenizer itself; without one, everything of the form <|...|> counts. Code that renders the
template itself has a third way, which changes nothing: `finetune_lab.lab.control_tokens.encode_text_safely`.
"""

import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError

from finetune_lab.errors import UserError
from finetune_lab.lab import layouts
from finetune_lab.lab.control_tokens import control_tokens, escape_control_tokens
from finetune_lab.lab.jsonl import MAX_LINE_BYTES, BadLine, Problem, kind_of, read_jsonl

FORMATS = {
    "messages": {"messages"},
    "prompt-completion": {"prompt", "completion"},
    "preference": {"prompt", "chosen", "rejected"},
    "unpaired": {"prompt", "completion", "label"},
}
SHAPES = {
    "messages": '{"messages": [...]}',
    "prompt-completion": '{"prompt", "completion"}',
    "preference": '{"prompt", "chosen", "rejected"}',
    "unpaired": '{"prompt", "completion", "label"}',
}
KEPT = {"id", "meta"}
SHOWN = 20


class DataError(UserError):
    """Every bad line of a file, in `problems` (file, line, wrong, expected); the message shows twenty reasons."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        groups: dict[tuple, list[Problem]] = {}
        for problem in problems:
            groups.setdefault((problem.file, problem.wrong, problem.expected), []).append(problem)
        shown = "\n".join(f"  {_together(group)}" for group in list(groups.values())[:SHOWN])
        rest = sum(map(len, list(groups.values())[SHOWN:]))
        more = f"\n  ... and {rest} more" if rest else ""
        lines = "1 bad line" if len(problems) == 1 else f"{len(problems)} bad lines"
        super().__init__(f"{lines}; no row was loaded.\n{shown}{more}")


def _together(group: list[Problem], most: int = 6) -> str:
    """Problems of one reason as one line of text: "FILE: lines 1-20, 24: ..."."""
    if len(group) == 1:
        return str(group[0])
    runs: list[list[int]] = []
    for line in (problem.line for problem in group):
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    some = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]) + (", ..." if len(runs) > most else "")
    return f"{group[0].file}: {len(group)} lines ({some}): {group[0].wrong}; expected {group[0].expected}"


def load_jsonl(
    path: str | Path,
    kind: str | None = None,
    *,
    tokenizer=None,
    special_tokens: str = "error",
    max_line_bytes: int = MAX_LINE_BYTES,
    kinds: Sequence[str] = tuple(FORMATS),
    lines: list[int] | None = None,
) -> list[dict]:
    """Return the rows of a JSONL file in conversational form, ready for `datasets.Dataset.from_list`.

    kind: "messages", "prompt-completion", "preference" or "unpaired"; None takes the format of the first line that has one.
    tokenizer: of the model to train; decides what a control token is. special_tokens: "error" or "escape".
    kinds: the formats that messages tell the reader to write. lines: a list that gets the line number of each row.
    Raises DataError with all bad lines at once, UserError for a file that cannot be read or has no rows.
    """
    path = Path(path)
    if kind is not None and kind not in FORMATS:
        raise UserError(f"kind is {kind!r}; expected one of {', '.join(FORMATS)}, or None to find out.")
    if special_tokens not in ("error", "escape"):
        raise UserError(f"special_tokens is {special_tokens!r}; expected 'error' or 'escape'.")
    rows, problems, escaped = [], [], []
    try:
        for number, value in read_jsonl(path, max_line_bytes):
            try:
                if isinstance(value, BadLine):
                    raise value
                found = format_of(value, kinds)
                if kind is not None and found != kind:
                    raise BadLine(f"the line is {found} data", f"{kind}, as asked for or as in the lines before")
                kind = found
                row = conversational(value, found)
                if _guard(row, tokenizer, escape=special_tokens == "escape"):
                    escaped.append(number)
                rows.append(row)
                if lines is not None:
                    lines.append(number)
            except BadLine as error:
                problems.append(Problem(str(path), number, error.wrong, error.expected))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}. Give a JSONL file.") from error
    if problems:
        raise DataError(problems)
    if not rows:
        raise UserError(f"{path} has no rows. Give a JSONL file: one JSON object on each line.")
    if escaped:
        some = ", ".join(map(str, escaped[:SHOWN])) + (", ..." if len(escaped) > SHOWN else "")
        warnings.warn(f"{path}: control tokens written as text in {len(escaped)} line(s): {some}", stacklevel=2)
    return rows


def format_of(row: dict, kinds: Sequence[str] = tuple(FORMATS)) -> str:
    """The name of the row's format, from its keys. Raises BadLine when it is none of the four, naming `kinds`."""
    keys = set(row) - KEPT
    for name, needed in FORMATS.items():
        if keys == needed:
            return name
    hint = layouts.hint(keys, {kind: FORMATS[kind] for kind in kinds})
    listed = ", ".join(repr(key[:40]) for key in sorted(keys)[:8]) or "none"
    *most, last = (SHAPES[kind] for kind in kinds)
    expected = f"{', '.join(most) + ' or ' if most else ''}{last}, and nothing else but 'id' and 'meta'"
    raise BadLine(f"the keys are {listed}", expected + (f" ({hint})" if hint else ""))


def conversational(row: dict, kind: str) -> dict:
    """The row with every text as a list of messages. Raises BadLine for wrong roles, order or empty text."""
    out = {key: row[key] for key in row if key in KEPT}
    if kind == "messages":
        return out | {"messages": _turns(row["messages"], "messages", last="assistant")}
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    out["prompt"] = _turns(prompt, "prompt", last="user")
    for key in ("chosen", "rejected") if kind == "preference" else ("completion",):
        answer = row[key]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        layouts.refuse_conversation(answer, key, out["prompt"])
        out[key] = _turns(answer, key, last="assistant", first="assistant")
        if len(out[key]) != 1:
            raise BadLine(
                f"{key} has {len(out[key])} turns", "one assistant turn; the turns before it belong to prompt"
            )
    if kind == "preference" and out["chosen"] == out["rejected"]:
        raise BadLine("chosen and rejected are the same", "two different answers: an equal pair teaches nothing")
    if kind == "unpaired":
        if not isinstance(row["label"], bool):
            wanted = "true for a good answer, false for a bad one (write true for 1, false for 0)"
            raise BadLine(f"label is {kind_of(row['label'])}", wanted)
        out["label"] = row["label"]
    return out


def _turns(messages, where: str, *, last: str, first: str = "user") -> list[dict]:
    """Check a list of messages: known roles, real text, an optional system turn, then `first` and the other in turn."""
    if not isinstance(messages, list):
        raise BadLine(
            f"{where} is {kind_of(messages)}", f"a list of messages{'' if where == 'messages' else ' or a text'}"
        )
    if not messages:
        raise BadLine(f"{where} is empty", "at least one turn")
    turn = first
    for i, message in enumerate(messages):
        at = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise BadLine(f"{at} is {kind_of(message)}", 'an object {"role": ..., "content": ...}')
        if set(message) != {"role", "content"}:
            keys = ", ".join(repr(key[:40]) for key in sorted(message)[:8]) or "none"
            raise BadLine(f"the keys of {at} are {keys}", "exactly 'role' and 'content'")
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise BadLine(f"the role of {at} is {str(role)[:40]!r}", "system, user or assistant")
        _text(message["content"], f"{at} ({role})")
        if role == "system" and i == 0 and first == "user":
            continue
        if role != turn:
            raise BadLine(
                f"{at} is a {role} turn", f"{turn}: a system turn only first, then user and assistant in turn"
            )
        turn = "assistant" if role == "user" else "user"
    if role != last:
        raise BadLine(f"the last turn of {where} is {role}", f"{last}")
    return messages


def _text(content, at: str) -> None:
    if not isinstance(content, str):
        raise BadLine(f"the content of {at} is {kind_of(content)}", "a string")
    if "\0" in content:
        raise BadLine(f"the content of {at} has a NUL at character {content.index(chr(0)) + 1}", "text")
    if all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in content):
        raise BadLine(f"the content of {at} is empty or only white space", "some text")


def token_counts(row: dict, tokenizer) -> list[int]:
    """Tokens of each conversation in a loaded row, the template's own included: one, or two for a preference pair."""
    if "messages" in row:
        conversations = [row["messages"]]
    else:
        conversations = [row["prompt"] + row[key] for key in ("completion", "chosen", "rejected") if key in row]
    try:
        return [len(tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]) for turns in conversations]
    except (TemplateError, ValueError) as error:
        raise UserError(f"The model's chat template refuses this data: {error}") from error


def _guard(row: dict, tokenizer, *, escape: bool) -> bool:
    """Refuse (BadLine) or escape control tokens in all texts of a row. True when something was escaped."""
    changed = False
    for key in ("messages", "prompt", "completion", "chosen", "rejected"):
        for i, message in enumerate(row.get(key, ())):
            found = control_tokens(message["content"], tokenizer)
            if found and not escape:
                position, token = found[0]
                raise BadLine(
                    f"{key}[{i}] ({message['role']}) holds the control token {token!r} at character {position + 1}",
                    "plain text; --special-tokens escape (in Python: special_tokens='escape') keeps it as visible text",
                )
            if found:
                try:
                    message["content"] = escape_control_tokens(message["content"], tokenizer)
                except ValueError as error:
                    raise BadLine(f"{key}[{i}] ({message['role']}): {error}", "text without it") from None
                changed = True
    return changed
