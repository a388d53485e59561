"""Layouts of public data sets that are nearly one of ours, and how to turn them into it. Used by `lab.data`.

Nothing is renamed or dropped here: a guess would be silent. Alpaca (instruction, input, output), ShareGPT
(conversations), Anthropic HH and UltraFeedback (whole conversations in chosen and rejected, score columns).
"""

from collections.abc import Mapping, Sequence

from finetune_lab.lab.jsonl import BadLine

HINTS = {
    "instruction": "this looks like Alpaca: join instruction and input as 'prompt', rename output to 'completion'",
    "conversations": "this looks like ShareGPT: write 'messages', with 'role' for 'from' and 'content' for 'value'",
    "text": "plain text says nothing about who speaks: split it into the keys named above",
}
OURS = {
    "question": "prompt", "query": "prompt", "input": "prompt", "answer": "completion", "response": "completion",
    "output": "completion",
}  # fmt: skip


def hint(keys: set[str], formats: Mapping[str, set[str]]) -> str | None:
    """What to rename and to drop so that `keys` become one of `formats` (name: keys needed); None for no idea."""
    for name, text in HINTS.items():
        if name in keys:
            return text
    renamed = {key: OURS[key] for key in sorted(keys) if key in OURS and OURS[key] not in keys}
    have = {renamed.get(key, key) for key in keys}
    fitting = [needed for needed in formats.values() if needed <= have]
    if fitting:
        needed = max(fitting, key=len)
        todo = [f"rename {old!r} to {new!r}" for old, new in renamed.items() if new in needed]
        if extra := sorted(key[:40] for key in keys if renamed.get(key, key) not in needed):
            todo.append(f"drop {', '.join(map(repr, extra[:8]))}, or keep them inside 'meta'")
        return " and ".join(todo)
    if {"chosen", "rejected"} <= have and "preference" in formats:
        return "write the turns before the last answer as 'prompt', and keep only the last assistant turn in chosen and rejected"
    return None


def refuse_conversation(answer, key: str, prompt: Sequence[dict]) -> None:
    """Raise BadLine for an answer that is a whole conversation, beginning with the user (UltraFeedback)."""
    if not isinstance(answer, list) or len(answer) < 2 or not all(isinstance(turn, dict) for turn in answer):
        return
    if answer[0].get("role") not in ("user", "system"):
        return
    repeats = any(turn.get("content") == prompt[-1]["content"] for turn in answer[:-1])
    raise BadLine(
        f"{key} {'repeats the prompt' if repeats else 'is a whole conversation'} ({len(answer)} turns)",
        "only the last assistant turn" + ("" if repeats else "; the turns before it belong to prompt"),
    )
