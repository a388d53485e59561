"""Read a JSONL file written by anybody: one JSON object a line, and an exact complaint about each line that is not.

Lines are read in bounded memory and never repaired by guessing. Accepted as they are: UTF-8 with or without a byte
order mark, \\n or \\r\\n, blank lines. Python's own `json` is too kind for training data (it takes NaN and keeps the
last of two equal keys), so both are refused here. In production: `datasets.load_dataset("json")`, which stops at the
first bad line.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_LINE_BYTES = 1_000_000  # about 200,000 tokens: no example that a model can be trained on is longer


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line. `line` counts from 1, as editors do."""

    file: str
    line: int
    wrong: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.wrong}; expected {self.expected}"


class BadLine(ValueError):
    """Raised while reading one line; becomes a Problem."""

    def __init__(self, wrong: str, expected: str):
        super().__init__(wrong)
        self.wrong, self.expected = wrong, expected


def read_jsonl(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, dict | BadLine]]:
    """Yield (line number, object or BadLine) for every line that is not blank. Never holds more than one line."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(max_line_bytes + 2):  # room for \r\n
            number += 1
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    yield 1, BadLine("the file is UTF-16", "UTF-8: save the file again with that encoding")
                    return
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line.rstrip(b"\r\n")) > max_line_bytes:
                size = len(line)
                while not line.endswith(b"\n") and (line := file.readline(1 << 16)):
                    size += len(line)
                yield number, BadLine(f"the line has {size:,} bytes", f"at most {max_line_bytes:,}: split the example")
            elif line.strip():
                try:
                    yield number, parse(line)
                except BadLine as error:
                    yield number, error


def parse(line: bytes) -> dict:
    """The JSON object in a line of bytes. Raises BadLine for everything else."""
    try:
        text = line.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        bad = line[error.start]
        raise BadLine(
            f"byte {error.start + 1} of the line (0x{bad:02x}) is not UTF-8", "a file saved as UTF-8"
        ) from None
    if "\0" in text:
        raise BadLine(
            f"a NUL byte at character {text.index(chr(0)) + 1}", "text: the file is damaged or binary"
        ) from None
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
        if "\\ud" in text.lower():  # an escape that may be half a character, which no tokenizer can take
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at character {error.colno}", "one JSON object on each line") from None
    except RecursionError:
        raise BadLine("brackets nested too deeply", "one JSON object with a few levels") from None
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise BadLine(
            f"half a character ({half}, a lone surrogate)", "whole characters: \\ud83d\\ude00 or the character"
        ) from None
    except BadLine:
        raise
    except ValueError:  # Python refuses whole numbers of more than 4,300 digits
        raise BadLine("a number with thousands of digits", "a number of ordinary length") from None
    if not isinstance(value, dict):
        raise BadLine(f"the line is {kind_of(value)}", "one JSON object on each line, {...}")
    return value


def kind_of(value) -> str:
    """The JSON name of a value's type, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    seen: dict = {}
    for key, value in pairs:
        if key in seen:
            raise BadLine(f"the key {key[:60]!r} appears twice in one object", "each key once")
        seen[key] = value
    return seen


def _no_constant(name: str):
    raise BadLine(f"{name} is not JSON", "a number or null")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadLine(f"the number {text[:40]} is too large", "a number of ordinary size")
    return value
