"""One setting of a recipe: its kind, its bounds, its help; and its value read from YAML or the command line.

A value is text, or what PyYAML makes of it; what cannot be read, or is out of bounds, is one sentence that names it.
"""

import dataclasses
import math
from dataclasses import field

from finetune_lab.errors import UserError


def setting(default, kind: str, text: str, **bounds):
    """A field of a recipe. kind: text, number, count, switch, names; bounds: choices, least, above, most, below;
    such_as: a number to name in messages, where the default is none."""
    return field(default=default, metadata={"kind": kind, "help": text, **bounds})


def checked(each: dataclasses.Field, value):
    """The value of a field in its own type. Raises UserError when it is of another kind or out of bounds."""
    name, rule = each.name, each.metadata
    if value is None:
        if each.default is None:
            return None
        raise UserError(f"{name} is empty: {_wanted(each)}.")
    try:
        value = _READ[rule["kind"]](value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} is {value!r}: {_wanted(each)}.") from None
    low, high = rule.get("least", -math.inf), rule.get("most", math.inf)
    choices = rule.get("choices")
    if choices and value not in choices:
        raise UserError(f"{name} is {value!r}: {_wanted(each)}.")
    if rule["kind"] in ("number", "count") and not (
        low <= value <= high and rule.get("above", -math.inf) < value < rule.get("below", math.inf)
    ):
        raise UserError(f"{name} is {value!r}: {_wanted(each)}.")
    return value


def _wanted(each: dataclasses.Field) -> str:
    rule = each.metadata
    if "choices" in rule:
        return f"choose one of {', '.join(rule['choices'])}"
    example = rule.get("such_as") or each.default or 0.1
    kinds = {
        "number": f"a number such as {example}",
        "count": "a whole number",
        "switch": "true or false",
        "text": "text",
    }
    bounds = [f"{word} {rule[key]}" for key, word in _WORDS.items() if key in rule]
    return f"give {kinds.get(rule['kind'], 'a name or a list of names')}" + (
        f", {' and '.join(bounds)}" if bounds else ""
    )


_WORDS = {"least": "at least", "above": "above", "most": "at most", "below": "below"}


def _number(value) -> float:
    if isinstance(value, bool) or not math.isfinite(value := float(value)):
        raise ValueError
    return value


def _count(value) -> int:
    value = _number(value)
    if value != int(value):
        raise ValueError
    return int(value)


def _switch(value) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _text(value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _names(value) -> tuple[str, ...]:
    names = [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError
    return tuple(names)


_READ = {"number": _number, "count": _count, "switch": _switch, "text": _text, "names": _names}
