"""Read what a learner typed as a number with a unit: `16.8M`, `4,194,304`, `≈ 3.6 GB`, `1.5e9`, `12 %`, `0,5`, `3/11`.

`read(text)` gives a value and the unit's text; `unit_of(text)` gives the dimension of a unit and its size, so that
`3600 MB` and `3.6 GB` are the same. Magnitudes K, M, B (or G, billion) and T are powers of 1000; KiB, MiB and GiB are
powers of 1024. A comma followed by three digits groups them (`3,500` is 3500), else it is a decimal comma.
Leaves out: calculations (type the result), ranges, currencies.
"""

import math
import re
import unicodedata
from dataclasses import dataclass

from finetune_lab.errors import UserError

_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_MAGNITUDES = {
    1e3: ("k", "thousand"),
    1e6: ("m", "million", "millions", "mio", "mn"),
    1e9: ("b", "bn", "g", "billion", "billions"),
    1e12: ("t", "trillion", "trillions"),
}
_MAGNITUDE = {word: factor for factor, words in _MAGNITUDES.items() for word in words}
_DECIMAL, _BINARY = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}, {"ki": 1, "mi": 2, "gi": 3, "ti": 4, "pi": 5}
_SECONDS = {
    1e-9: ("ns",),
    1e-6: ("us", "µs", "μs"),
    1e-3: ("ms", "millisecond"),
    1.0: ("s", "sec", "second"),
    60.0: ("min", "minute"),
    3600.0: ("h", "hr", "hour"),
    86400.0: ("d", "day"),
}
_TIME = {word: factor for factor, words in _SECONDS.items() for word in words}
_WORDS = {"param": "parameter", "weight": "parameter", "tok": "token"}

_INT = r"[1-9]\d{0,2}(?:[,_' ]\d{3})+(?!\d)|[1-9]\d{0,2}(?:\.\d{3}){2,}(?!\d)|\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>{_INT})(?P<part>\.\d+|,\d+)?|(?P<bare>\.\d+))\.?"
    r"(?:e(?P<e>[+-]?\d+)(?![\w])|\s*[x×*·]\s*10\s*(?:\^|\*\*)\s*(?P<ten>[+-]?\d+)"
    r"|\s*(?:\^|\*\*)\s*(?P<power>[+-]?\d+)|\s*/\s*(?P<under>\d+(?:\.\d+)?))?",
    re.IGNORECASE,
)
_ABOUT = re.compile(r"^\s*(?:(?:≈|~|=|about|approximately|approx\.?|ca\.?|circa|roughly|around)\s*)+", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """`value` as typed, a trailing magnitude (`16.8M`) included, and the `unit` behind it as typed, maybe empty."""

    value: float
    unit: str


def read(text: object, of_bytes: bool = False) -> Quantity:
    """The number in `text`. `of_bytes`: the answer is a size in bytes, so that a lone `B` is the byte, not a billion.

    Raises:
        UserError: there is none, more than one, or it is not finite; the message says what to type.
    """
    shown = " ".join(str("" if text is None else text).split())
    if not shown:
        raise UserError("there is no answer yet: type a number, such as 16.8M or 3.6 GB")
    if len(shown) > 200:
        raise UserError(f"that is {len(shown)} characters: type one number, such as 16.8M or 3.6 GB")
    plain = re.sub("(?<=[0-9])(?=[⁰¹²³⁴⁵⁶⁷⁸⁹⁻])", "^", shown).translate(_SUPERSCRIPT)
    plain = unicodedata.normalize("NFKC", plain).replace("−", "-").replace("’", "'")
    plain = _ABOUT.sub("", plain).strip()
    match = _NUMBER.match(plain)
    if match is None:
        if re.match(r"[+-]?(nan|inf)", plain, re.IGNORECASE):
            raise UserError(f"{shown!r} is not a number one can check: type digits, such as 16.8M or 3.6 GB")
        raise UserError(f"{shown!r} is not a number: type digits first, such as 16.8M, 4,194,304 or 3.6 GB")
    value, rest = _value(match, shown), plain[match.end() :].strip().rstrip(".").strip()
    if re.search(r"\d|^[-+*/^(]", rest):
        raise UserError(f"cannot read {rest!r} behind the number: type one number, the result, and its unit")
    word, *others = re.split(r"\s+", rest, maxsplit=1) if rest else [""]
    if word.lower() in _MAGNITUDE and not (of_bytes and word.lower() == "b" and not others):
        return Quantity(_finite(value * _MAGNITUDE[word.lower()], shown), others[0] if others else "")
    return Quantity(value, rest)


def _value(match: re.Match, shown: str) -> float:
    whole, part = match["whole"], match["part"] or ""
    if whole is None:
        value = float(match["bare"])
    else:
        grouped = re.sub(r"[,_' ]", "", whole)
        if grouped.count(".") > 1:
            grouped = grouped.replace(".", "")
        value = float(grouped + part.replace(",", "."))
    try:
        if match["power"]:
            value **= int(match["power"])
        elif match["under"]:
            value /= float(match["under"])
        else:
            value *= 10.0 ** int(match["e"] or match["ten"] or 0)
    except OverflowError:
        value = math.inf
    except ZeroDivisionError:
        raise UserError(f"{shown!r} divides by zero: type a number, such as 16.8M or 3.6 GB") from None
    return _finite(-value if match["sign"] == "-" else value, shown)


def _finite(value: float, shown: str) -> float:
    if not math.isfinite(value):
        raise UserError(f"{shown!r} is too large to be an answer: type a number, such as 16.8M or 3.6 GB")
    return value


def unit_of(text: str) -> tuple[str, float]:
    """Dimension and size of a unit: `GB` is ("byte", 1e9), `%` ("", 0.01), `tokens/s` ("token/s", 1.0)."""
    words = " ".join(unicodedata.normalize("NFKC", text).strip(" .()").split())
    words = re.sub(r"\bper\s+cent\b", "%", words, flags=re.IGNORECASE)
    top, *below = re.split(r"\s*/\s*|\s+per\s+", words)
    dimension, size = _one(top)
    for unit in below:
        one, factor = _one(unit)
        dimension, size = f"{dimension}/{one}", size / factor
    return dimension, size


def _one(word: str) -> tuple[str, float]:
    first, _, rest = word.partition(" ")
    if rest and first.lower() in _MAGNITUDE:
        dimension, size = _one(rest)
        return dimension, size * _MAGNITUDE[first.lower()]
    low = word.lower()
    if low in ("%", "percent", "pct"):
        return "", 0.01
    if low in ("x", "×", "times", "fold"):
        return "", 1.0
    single = low[:-1] if low.endswith("s") and len(low) > 2 and not low.endswith("ss") else low
    for seconds in (low, single):
        if seconds in _TIME:
            return "s", _TIME[seconds]
    match = re.fullmatch(
        r"(ki|mi|gi|ti|pi|kibi|mebi|gibi|tebi|kilo|mega|giga|tera|k|m|g|t|p)?(bytes?|bits?|b|flops?)", low
    )
    if match:
        prefix, kind = match[1] or "", match[2].rstrip("s")
        prefix = {"kibi": "ki", "mebi": "mi", "gibi": "gi", "tebi": "ti"}.get(prefix, prefix)
        size = 1024.0 ** _BINARY[prefix] if prefix in _BINARY else 1000.0 ** _DECIMAL[prefix[:1]]
        return {"b": "byte"}.get(kind, kind), size
    return _WORDS.get(single, single), 1.0
