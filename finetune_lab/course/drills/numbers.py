"""Number drills: draw the numbers of a question, compute its answer with the package, judge what was typed.

The answer is never written down: `compute` is called on the drawn numbers each time, so it cannot go stale.
"""

import math
import random
from dataclasses import dataclass

from finetune_lab.course.drills import quantity
from finetune_lab.course.drills.links import find
from finetune_lab.course.drills.schema import Number, WrongNumber
from finetune_lab.errors import UserError

EXACT = 1e-9  # relative; two ways to the same float
_SIZES = {1e3: "1,000", 1e6: "a million", 1e9: "a billion", 1e12: "10^12"}
_BYTES = {1024.0: "1,024", 1024.0**2: "1,024 squared", 1024.0**3: "1,024 cubed", 8.0: "8 (bits and bytes)"}


@dataclass(frozen=True)
class Drawn:
    """One question with its numbers. `answer` is in `item.unit`; `wrong`: typical wrong answers and their hints."""

    item: Number
    seed: int
    values: dict
    question: str
    solution: str
    answer: float
    wrong: tuple[tuple[float, str], ...]


def draw(item: Number, seed: int) -> Drawn:
    """The question of `item` for this seed: the same seed gives the same numbers on every machine."""
    source = random.Random(f"{item.id}:{seed}")
    values = {name: _pick(choices, source) for name, choices in item.draw.items()}
    answer = evaluate(item, values)
    return Drawn(
        item,
        seed,
        values,
        item.question.format(**values),
        item.solution.format(**values, answer=answer),
        answer,
        tuple((evaluate(item, values, mistake), mistake.hint) for mistake in item.wrong),
    )


def _pick(choices: list | dict, source: random.Random):
    if isinstance(choices, list):
        return source.choice(choices)
    low, high, step = choices["low"], choices["high"], choices["step"]
    value = low + step * source.randint(0, math.floor((high - low) / step + EXACT))
    return value if isinstance(value, int) else round(value, 12)


def evaluate(item: Number, values: dict, mistake: WrongNumber | None = None) -> float:
    """The answer in `item.unit`, or the number that a typical mistake gives."""
    compute, arguments, factor = item.compute, item.arguments, 1
    if mistake is not None:
        factor = mistake.factor
        if mistake.compute is not None:
            compute, arguments = mistake.compute, mistake.arguments
        else:
            arguments = {**arguments, **(mistake.arguments or {})}
    result = find(compute)(**{name: _resolve(value, values) for name, value in arguments.items()})
    if factor == 1 and item.scale == 1:
        return result  # a count stays a whole number
    return result * factor / item.scale


def _resolve(value, values: dict):
    """A drawn name becomes its value, `model.width` a field of a drawn mapping; lists and mappings element by element."""
    if isinstance(value, list):
        return [_resolve(one, values) for one in value]
    if isinstance(value, dict):
        return {key: _resolve(one, values) for key, one in value.items()}
    if isinstance(value, str):
        name, _, field = value.partition(".")
        if name in values:
            return values[name][field] if field else values[name]
    return value


def close(item: Number, value: float, target: float) -> bool:
    return abs(value - target) <= max(item.tolerance, EXACT) * abs(target) + 1e-12


def verdict(drawn: Drawn, text: object) -> tuple[str, str]:
    """`(status, sentence)` for what was typed; see `judge.Verdict` for the statuses."""
    item = drawn.item
    try:
        typed = quantity.read(text, of_bytes=quantity.unit_of(item.unit)[0].split("/")[0] == "byte")
        value = _in_unit(item, typed)
    except UserError as error:
        return "again", str(error)
    if close(item, value, drawn.answer):
        exact = abs(value - drawn.answer) <= EXACT * abs(drawn.answer)
        return "ok", "right" if exact else f"right (precisely {show(drawn.answer)} {item.unit}".rstrip() + ")"
    for mistake in item.unit_mistakes:
        if close(item, value, drawn.answer * mistake.factor):
            return "again", mistake.hint
    hints = [hint for number, hint in drawn.wrong if close(item, value, number)]
    if hints:  # some draws make two mistakes equal
        return "wrong", " Or: ".join(hints)
    return _how_far(item, value, drawn.answer)


def _how_far(item: Number, value: float, answer: float) -> tuple[str, str]:
    """A wrong number that no hint knows: the size of the unit, the sign, the rounding, or how far off it is."""
    if not answer or value * answer <= 0:
        return "wrong", "the sign is wrong" if answer and close(item, -value, answer) else "not yet: work it out again"
    dimension = quantity.unit_of(item.unit)[0].split("/")[0]
    sizes = {**_SIZES, **(_BYTES if dimension in ("byte", "bit") else {}), **({} if dimension else {100.0: "100"})}
    for factor, words in sizes.items():
        if close(item, value, answer * factor) or close(item, value, answer / factor):
            asked = f"; the answer is asked in {item.unit}" if item.unit else ""
            return "again", f"the digits are right, the size is not: off by a factor of {words}{asked}"
    ratio = value / answer
    if abs(ratio - 1) < 0.02:
        asked = "every digit counts here" if item.tolerance == 0 else f"it must be right to {100 * item.tolerance:g} %"
        return "wrong", f"close, but {asked}: do not round on the way"
    how = (
        f"{show(float(f'{ratio:.2g}'))} times too large"
        if ratio > 1
        else f"{show(float(f'{1 / ratio:.2g}'))} times too small"
    )
    return "wrong", f"not yet: {how}"


def _in_unit(item: Number, typed: quantity.Quantity) -> float:
    """The typed value in the item's unit.

    Raises:
        UserError: a unit that says something else, or none where there is a choice (GB or GiB, % or a fraction).
    """
    dimension, size = quantity.unit_of(item.unit)
    if not typed.unit:
        if size == 1.0 and dimension.split("/")[0] not in ("byte", "bit", "s"):
            return typed.value
        raise UserError(f"{show(typed.value)} of what? Write the unit too: the answer is asked in {item.unit}")
    given, given_size = quantity.unit_of(typed.unit)
    if given != dimension:
        wanted = f"in {item.unit}" if item.unit else "as a plain number"
        raise UserError(f"the unit {typed.unit!r} does not fit: the answer is asked {wanted}")
    return typed.value * given_size / size


def show(value: float) -> str:
    """At most six digits: 16,777,216 stays whole, 3.62518 is cut."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.6g}" if 1e-4 <= abs(value) < 1e15 else f"{value:.6g}"
