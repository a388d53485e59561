"""The ledger for people: tables, sentences and JSON. Sizes are GB = 10^9 bytes; where a tool prints GiB, both stand.

Why GB: 8 billion parameters of 2 bytes are 16 GB, in the head. torch and nvidia-smi count GiB (1 GiB = 1.074 GB), and a
card sold with "24 GB" has 24 GiB = 25.8 GB, of which a program sees a little less.
"""

import re
import textwrap
from dataclasses import asdict

from finetune_lab.errors import UserError
from finetune_lab.methods.memory import Architecture, Ledger, Line, Recipe
from finetune_lab.methods.memory.fit import Saving
from finetune_lab.methods.memory.presets import GIB

UNITS = {"": 10**9, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": GIB, "tib": 2**40}
UNIT_NOTE = "GB = 10^9 bytes. torch and nvidia-smi count GiB: 1 GiB = 1.074 GB, so a card sold with 24 GB has 25.8 GB."
SMALL = 0.005  # lines below this share of the peak are added up


def parse_size(text: str) -> int:
    """Bytes of `24GB`, `24 GiB`, `512MB` or `24` (GB). Raises UserError, one sentence."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise UserError(f"{text!r} is not a size: give a number and a unit, such as 24GB (10^9 bytes) or 24GiB (2^30).")
    size = int(float(match[1]) * UNITS[match[2].lower()])
    if size < 1:
        raise UserError(f"{text!r} is no memory at all: give a size such as 24GB.")
    return size


def gb(size: float) -> str:
    """`16.06 GB`; below 0.1 GB in MB, below 0.1 MB in bytes."""
    if abs(size) >= 1e8:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.2f} MB" if abs(size) >= 1e5 else f"{size:,.0f} B"


def both(size: float) -> str:
    """`25.25 GB = 23.52 GiB`, for comparing with what torch prints."""
    return f"{gb(size)} = {size / GIB:.2f} GiB"


def headline(architecture: Architecture, recipe: Recipe) -> str:
    """The model and the recipe in one line."""
    targets = recipe.targets if isinstance(recipe.targets, str) else ",".join(recipe.targets)
    method = recipe.method if recipe.method == "full" else f"{recipe.method} r={recipe.rank} on {targets}"
    parts = [f"{architecture.name} ({architecture.parameters():,} parameters)", method, recipe.objective]
    if recipe.objective == "grpo":
        parts[-1] += f" with {recipe.generations} answers"
    parts += [f"batch {recipe.batch} x {recipe.seq} tokens", f"checkpointing {'on' if recipe.checkpointing else 'off'}"]
    parts += [recipe.optimizer, recipe.dtype + (" with fp32 master" if recipe.master_weights else ""), recipe.attention]
    if recipe.ranks > 1:
        parts.append(f"{recipe.sharding} over {recipe.ranks} ranks, bytes of one")
    return " · ".join(parts)


def table(ledger: Ledger, every: bool = False) -> str:
    """The lines under their categories, the largest first; a category's own row says what of it is alive at the peak."""
    at_peak, rows = ledger.categories(), []
    for category in dict.fromkeys([*at_peak, *(line.category for line in ledger.lines)]):
        lines = [line for line in ledger.lines if line.category == category]
        rows += _group(category, lines, gb(at_peak.get(category, 0)), ledger.peak, every)
    rows.append(("peak", "", gb(ledger.peak), ledger.peak_moment))
    rows += [(line.name, "", gb(line.bytes), line.why) for line in ledger.device]
    rows.append(("on the device", "", gb(ledger.total_on_device), ""))
    rows += _group("in the host's memory", list(ledger.host), "", ledger.peak, every)
    wide = max(len(row[0]) for row in rows)
    head = f"{'':{wide}}{'size':>12}{'at the peak':>13}  why"
    return "\n".join([head, *(f"{a:{wide}}{b:>12}{c:>13}  {d}".rstrip() for a, b, c, d in rows)])


def _group(name: str, lines: list[Line], at_peak: str, peak: int, every: bool) -> list[tuple[str, str, str, str]]:
    """A row of its own for the category, then its lines; those below SMALL of the peak in one row.

    Where all are small, the largest three are shown all the same.
    """
    lines = sorted((line for line in lines if line.bytes), key=lambda line: -line.bytes)
    if not lines and at_peak in ("", gb(0)):
        return []
    shown = [line for line in lines if every or line.bytes >= SMALL * peak] or lines[:3]
    rest = sum(line.bytes for line in lines[len(shown) :])
    rows = [(name, gb(sum(line.bytes for line in lines)) if lines else "", at_peak, "")]
    rows += [(f"  {line.name}", gb(line.bytes), "", _why(line)) for line in shown]
    if rest:
        left = len(lines) - len(shown)
        rows.append((f"  {left} smaller line{'s' if left > 1 else ''}", gb(rest), "", ""))
    return rows


def _why(line: Line) -> str:
    """The line's reason; `32 x 4096:` becomes `32 x 4,096 bytes:`, so that the unit of what is multiplied is seen."""
    return re.sub(r"^(\d+) x (\d+):", lambda m: f"{m[1]} x {int(m[2]):,} bytes:", line.why)


def moments(ledger: Ledger, most: int = 12) -> str:
    """Bytes through one step, the peak marked; of long steps the highest moments, in their order."""
    totals = list(ledger.totals.items())
    kept = sorted(sorted(range(len(totals)), key=lambda n: -totals[n][1])[:most])
    lines = [
        f"{'>' if totals[n][0] == ledger.peak_moment else ' '} {gb(totals[n][1]):>12}  {totals[n][0]}" for n in kept
    ]
    return "\n".join(["through one step", *lines])


def verdict(ledger: Ledger, name: str, size: int) -> str:
    """`fits` or `does not fit`, with the bytes that are left or missing."""
    left = size - ledger.total_on_device
    what = f"{name} ({both(size)})"
    if left >= 0:
        return f"Fits into {what}: {gb(left)} to spare."
    return f"Does not fit into {what}: {gb(-left)} too much."


def summary(ledger: Ledger) -> str:
    """The peak and its moment in one sentence."""
    sentence = f"Peak {both(ledger.peak)} at this moment: {ledger.peak_moment}."
    return f"{sentence} With what the device takes itself: {both(ledger.total_on_device)}."


def levers(found: list[Saving]) -> str:
    """The ranked list: bytes that the peak loses, the lever, why, and what it costs."""
    wide = max((len(saving.lever) for saving in found), default=0)
    lines = ["levers, each pulled alone"]
    for saving in found:
        sign = "-" if saving.saves > 0 else "+" if saving.saves < 0 else ""
        start = f"{sign + gb(abs(saving.saves)):>12}  {saving.lever:{wide}}  "
        price = f". Price: {saving.price}" if saving.saves > 0 else ""
        lines.append(textwrap.fill(saving.why + price, 118, initial_indent=start, subsequent_indent=" " * len(start)))
    return "\n".join(lines)


def as_json(architecture: Architecture, recipe: Recipe, ledger: Ledger) -> dict:
    """Everything of one estimate; sizes in bytes."""
    return {
        "model": asdict(architecture) | {"parameters": architecture.parameters()},
        "recipe": asdict(recipe),
        "peak_bytes": ledger.peak,
        "peak_moment": ledger.peak_moment,
        "on_device_bytes": ledger.total_on_device,
        "categories_at_peak": ledger.categories(),
        "moments": [{"moment": moment, "bytes": sum(alive.values()), **alive} for moment, alive in ledger.timeline()],
        "lines": [asdict(line) for line in ledger.lines],
        "device": [asdict(line) for line in ledger.device],
        "host": [asdict(line) for line in ledger.host],
    }
