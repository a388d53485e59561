"""The rules of the question bank: what is wrong with one item of a YAML file, field by field.

First the fields (missing, unknown, of the wrong type), then values that cannot be. `schema` has the dataclasses that
the rules are read from.
"""

import re
import types
from collections.abc import Iterable
from dataclasses import MISSING, fields

from finetune_lab.course.drills import schema

MAX_SNIPPET = 14


def item_problems(entry: object) -> Iterable[str]:
    """What is wrong with one item: `field: what was given, what was expected`."""
    if not isinstance(entry, dict):
        yield f"expected fields, got {entry!r}"
        return
    cls = schema.KINDS.get(entry.get("kind")) if isinstance(entry.get("kind"), str) else None
    if cls is None:
        yield f"kind: {entry.get('kind')!r}, expected one of {', '.join(schema.KINDS)}"
        return
    problems = list(_field_problems(cls, entry))
    yield from problems
    if not problems:
        yield from _value_problems(cls, entry)


def _field_problems(cls: type, entry: dict, where: str = "") -> Iterable[str]:
    """Fields that are missing, unknown or of the wrong type; nested mappings too."""
    known = {field.name: field for field in fields(cls) if field.name != "file"}
    for key in sorted(set(entry) - set(known), key=str):
        yield f"{where}{key}: no such field, expected one of {', '.join(known)}"
    for name, field in known.items():
        if name not in entry:
            if field.default is MISSING:
                yield f"{where}{name}: missing"
            continue
        inner = schema.nested(cls, name)
        if inner:
            yield from _nested_problems(where + name, entry[name], *inner)
        elif not _is(entry[name], field.type):
            yield f"{where}{name}: {entry[name]!r}, expected {_words(field.type)}"


def _nested_problems(name: str, value: object, cls: type, least: int | None) -> Iterable[str]:
    if least is None:
        value, least = [value], 1
    if not isinstance(value, list) or len(value) < least or not all(isinstance(one, dict) for one in value):
        yield f"{name}: {value!r}, expected a list of at least {least} with {', '.join(f.name for f in fields(cls))}"
        return
    for position, one in enumerate(value, 1):
        yield from _field_problems(cls, one, f"{name} {position}: ")


def _is(value: object, kind: object) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in kind.__args__ if one is not types.NoneType)
    if kind is str:
        return isinstance(value, str) and (bool(value.strip()) or value == "")
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)  # tuple[str, ...]


def _words(kind: object) -> str:
    if isinstance(kind, types.UnionType):
        kind = kind.__args__[0]
    return {
        str: "text (numbers and words such as `no` need quotes)",
        float: "a number (write 1.0e+9, not 1e9)",
        int: "a whole number",
        dict: "a mapping with names",
    }.get(kind, "a list of texts, such as [] or [lora]")


def _value_problems(cls: type, entry: dict) -> Iterable[str]:
    """Fields of the right type with a value that cannot be."""
    for key, pattern, example in (
        ("id", r"[a-z0-9]+(-[a-z0-9]+)*", "kebab-case such as lora-parameters"),
        ("topic", r"[a-z0-9]+(-[a-z0-9]+)*", "the id of a topic"),
        ("lesson", r"\d\d", 'two digits in quotes, such as "01"'),
    ):
        if not re.fullmatch(pattern, entry[key]):
            yield f"{key}: {entry[key]!r}, expected {example}"
    if entry["level"] not in schema.LEVELS:
        yield f"level: {entry['level']!r}, expected one of {', '.join(schema.LEVELS)}"
    if not 1 <= entry["minutes"] <= 45:
        yield f"minutes: {entry['minutes']}, expected 1 to 45"
    yield from (
        f"rows: {row!r}, expected S and three digits" for row in entry["rows"] if not re.fullmatch(r"S\d{3}", row)
    )
    optional_text = {"unit", "section"}
    for field in fields(cls):
        if field.type is str and field.name not in optional_text and not str(entry.get(field.name, "x")).strip():
            yield f"{field.name}: empty"
    for source in entry["sources"]:
        given = [key for key in ("arxiv", "url", "library") if source.get(key)]
        if len(given) != 1:
            yield f"sources: {source['title']}: expected one of arxiv, url, library, got {len(given)}"
        if source.get("arxiv") and not re.fullmatch(r"\d{4}\.\d{4,5}", source["arxiv"]):
            yield f'sources: {source["arxiv"]!r}, expected an arXiv id such as "2106.09685"'
        if source.get("url") and not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/\S*)?", source["url"]):
            yield f"sources: {source['url']!r}, expected a link that starts with https://"
    yield from KIND_RULES.get(cls, lambda entry: ())(entry)


def _number_problems(entry: dict) -> Iterable[str]:
    for name, choices in entry["draw"].items():
        if not name.isidentifier() or name == "answer":
            yield f"draw: {name!r}, expected a name such as rank (and not `answer`)"
        if isinstance(choices, dict):
            ends = [choices.get(key) for key in ("low", "high", "step")]
            if set(choices) != {"low", "high", "step"} or not all(_is(end, float) for end in ends):
                yield f"draw: {name}: {choices!r}, expected low, high and step as numbers"
            elif ends[2] <= 0 or ends[1] < ends[0]:
                yield f"draw: {name}: {choices!r}, expected low <= high and step > 0"
        elif not isinstance(choices, list) or not choices:
            yield f"draw: {name}: {choices!r}, expected a list of choices or {{low, high, step}}"
    for mistake in [entry, *entry.get("wrong", [])]:
        compute = mistake.get("compute")
        if compute is not None and not re.fullmatch(r"finetune_lab(\.\w+)+:\w+", compute):
            yield f"compute: {compute!r}, expected finetune_lab.module:function"
    for mistake in entry.get("wrong", []):
        if mistake.get("compute") is None and mistake.get("arguments") is None and mistake.get("factor", 1) == 1:
            yield f"wrong: {mistake['hint']!r} changes nothing: expected compute, arguments or factor"
        if mistake.get("compute") is not None and mistake.get("arguments") is None:
            yield f"wrong: {mistake['hint']!r}: a compute of its own needs arguments of its own"
    for mistake in entry.get("unit_mistakes", []):
        if mistake["factor"] in (0, 1):
            yield f"unit_mistakes: factor {mistake['factor']} cannot be told from the right answer"
    if not 0 <= entry["tolerance"] <= 0.5:
        yield f"tolerance: {entry['tolerance']}, expected a relative tolerance from 0 (exact) to 0.5"
    if entry.get("scale", 1) <= 0:
        yield f"scale: {entry['scale']}, expected a positive number"
    if not re.search(r"\{answer\b", entry["solution"]):
        yield "solution: does not show {answer}"


def _bug_problems(entry: dict) -> Iterable[str]:
    lines = entry["snippet"].rstrip("\n").split("\n")
    if len(lines) > MAX_SNIPPET:
        yield f"snippet: {len(lines)} lines, expected at most {MAX_SNIPPET}"
    if not 1 <= entry["line"] <= len(lines):
        yield f"line: {entry['line']}, expected 1 to {len(lines)}"
    if not entry["detector"].isidentifier():
        yield f"detector: {entry['detector']!r}, expected the name of a function in detectors.py"


def _code_problems(entry: dict) -> Iterable[str]:
    if not re.fullmatch(r"finetune_lab(\.\w+)+:\w+", entry["reference"]):
        yield f"reference: {entry['reference']!r}, expected finetune_lab.module:name"
    if not entry["exercise"].isidentifier():
        yield f"exercise: {entry['exercise']!r}, expected a name in code_tests.py"
    if not 1 <= entry["limit_minutes"] <= 45:
        yield f"limit_minutes: {entry['limit_minutes']}, expected 1 to 45"


def _case_problems(entry: dict) -> Iterable[str]:
    for point in entry["rubric"]:
        if not 1 <= point["weight"] <= 3:
            yield f"rubric: {point['point']!r}: weight {point['weight']}, expected 1 to 3"


KIND_RULES = {
    schema.Number: _number_problems,
    schema.Bug: _bug_problems,
    schema.Code: _code_problems,
    schema.Case: _case_problems,
}
