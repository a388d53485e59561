"""Parameters of a merge: what each method takes, and one setting read at one tensor.

A setting is a value, a gradient (a list of values from the first layer to the last), or a list of filters: the first
whose text is part of the tensor's name counts. Rules and defaults are mergekit's (0.1.5); what mergekit would ignore in
silence, an unknown parameter or a density for a method that trims nothing, is refused.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_lab.errors import UserError

REQUIRED = object()


@dataclass(frozen=True)
class Method:
    """What a method takes: parameters of the whole merge and of each model with their defaults, and how many models."""

    title: str
    arxiv: str | None
    shared: dict
    each: dict
    base: bool = True  # needs a base model, which then has no weight of its own
    models: int | None = None  # exactly so many, the base included


def _task(title: str, arxiv: str, normalize: bool, rescale: bool | None, density: bool) -> Method:
    """A method on task vectors."""
    shared = {"normalize": normalize, "lambda": 1.0, "int8_mask": False}
    shared |= {} if rescale is None else {"rescale": rescale}
    return Method(title, arxiv, shared, {"weight": REQUIRED} | ({"density": 1.0} if density else {}))


METHODS = {
    "linear": Method("linear average", "2203.05482", {"normalize": True}, {"weight": REQUIRED}, base=False),
    "slerp": Method("SLERP", None, {"t": REQUIRED}, {}, models=2),
    "task_arithmetic": _task("task arithmetic", "2212.04089", False, None, density=False),
    "ties": _task("TIES", "2306.01708", True, None, density=True),
    "dare_linear": _task("DARE", "2311.03099", False, True, density=True),
    "dare_ties": _task("DARE with TIES", "2311.03099", False, True, density=True),
}
SWITCHES = {"normalize", "rescale", "int8_mask"}
SHARES = {  # settings from 0 to 1, in words
    "density": "a share from 0 to 1 (20 % is 0.2)",
    "t": "a place from 0 (the base) to 1 (the other); linear with weights such as -0.2 and 1.2 goes beyond a model",
}


def evaluate(setting, name: str, t: float, switch: bool = False):
    """A setting at one tensor: a value, a gradient (a list, read at t), or the first filter that is in the name.

    Numbers between two points of a gradient are interpolated; switches take the point before. None: nothing fits.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _switch(setting) if switch else _number(setting)
    if isinstance(setting[0], Mapping):
        for choice in setting:
            if choice.get("filter") in (None, "*") or choice["filter"] in name:
                return evaluate(choice["value"], name, t, switch)
        return None
    if switch:
        return _switch(setting[int(t * (len(setting) - 1))])
    at = t * (len(setting) - 1)
    low = int(at)
    high = min(low + 1, len(setting) - 1)
    return (1 - (at - low)) * _number(setting[low]) + (at - low) * _number(setting[high])


def read_parameters(value, place: str, method: str, shared: bool, each: bool) -> Mapping:
    """Settings of one place, every value checked."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{place} is {value!r}: expected names with values.")
    whole, own = set(METHODS[method].shared), set(METHODS[method].each)
    allowed = (whole if shared else set()) | (own if each else set())
    for key, setting in value.items():
        if key in allowed:
            _check_setting(setting, f"{place}.{key}", key)
        elif key in whole:
            raise UserError(f"{place}: {key} is a setting of the whole merge; move it to the outer parameters.")
        else:
            near = difflib.get_close_matches(str(key), allowed, 1)
            has = ", ".join(sorted(allowed)) or "none"
            raise UserError(
                f"{place}: {method} has no parameter {key!r} there"
                + (f"; did you mean {near[0]}?" if near else f" (it has: {has}).")
            )
    return value


def _check_setting(setting, place: str, key: str) -> None:
    """Raise UserError unless it is a value, a list of values, or a list of filters with values."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, list) and setting and all(isinstance(choice, Mapping) for choice in setting):
        for i, choice in enumerate(setting):
            known(choice, ("filter", "value"), f"{place}[{i}]", {})
            if "value" not in choice or isinstance(choice["value"], Mapping):
                raise UserError(f"{place}[{i}] has no value: expected `filter: PART OF A NAME` and `value: NUMBER`.")
            if not isinstance(choice.get("filter"), str | None):
                raise UserError(f"{place}[{i}].filter is {choice['filter']!r}: expected a part of a tensor's name.")
            _check_setting(choice["value"], f"{place}[{i}].value", key)
        return
    switch = key in SWITCHES
    for value in setting if isinstance(setting, list) and setting else [setting]:
        try:
            read = (_switch if switch else _number)(value)
        except (TypeError, ValueError):
            wanted = "true or false" if switch else "a number, a list of numbers, or filters with values"
            raise UserError(f"{place} is {value!r}: expected {wanted}.") from None
        if key in SHARES and not 0 <= read <= 1:
            raise UserError(f"{place} is {value!r}: expected {SHARES[key]}.")


def longest_gradient(setting) -> int:
    """How many values the longest gradient of a setting has; 1 for a single value."""
    if isinstance(setting, Mapping):
        return longest_gradient(setting["value"])
    if isinstance(setting, list) and isinstance(setting[0], Mapping):
        return max(longest_gradient(choice) for choice in setting)
    return len(setting) if isinstance(setting, list) else 1


def known(value: Mapping, names: tuple[str, ...], place: str, elsewhere: dict[str, str]) -> None:
    for key in value:
        if key in names:
            continue
        if key in elsewhere:
            instead = f"; use {elsewhere[key]}" if elsewhere[key] else " (merge with mergekit itself)"
            raise UserError(f"{place}: {key} is not supported here{instead}.")
        near = difflib.get_close_matches(str(key), names, 1)
        raise UserError(f"{place}: unknown key {key!r}; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}."))  # fmt: skip


def _number(value) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _switch(value) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}[value.lower()] if value.lower() in ("true", "false") else None
    if value not in (True, False):
        raise ValueError
    return bool(value)
