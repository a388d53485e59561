"""Is the learner's answer the expected one, and if not, what differs? In words.

`difference(expected, got)` returns None or one sentence. Tensors must agree in shape, dtype, device and values
(`|got - expected| <= atol + rtol * |expected|`, NaN equals NaN); numbers within the same tolerance; containers element
by element. A list may stand for a tuple, an int for a float of the same value; nothing else is converted.
"""

import copy as copying
import math
from dataclasses import fields, is_dataclass

import numpy as np
import torch

# Per dtype, as torch.testing.assert_close uses them; exercises may say otherwise.
TOLERANCE = {
    torch.float32: (1.3e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.float64: (1e-7, 1e-7),
}


def difference(expected, got, rtol: float | None = None, atol: float | None = None, where: str = "") -> str | None:
    """None when `got` is `expected`, else a sentence that says where (e.g. `[0]['labels']`) and what differs."""
    at = f"at {where}: " if where else ""
    if isinstance(expected, np.ndarray) and isinstance(got, np.ndarray) and expected.dtype != object:
        if expected.dtype != got.dtype:
            return f"{at}expected dtype {expected.dtype}, got {got.dtype}"
        expected, got = torch.from_numpy(expected.copy()), torch.from_numpy(got.copy())
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            return f"{at}expected a tensor of shape {tuple(expected.shape)}, got {describe(got)}"
        return _tensors(expected.detach(), got.detach(), rtol, atol, at)
    if isinstance(expected, bool) or expected is None or isinstance(expected, str | bytes):
        same = type(got) is type(expected) and got == expected
        return None if same else f"{at}expected {describe(expected)}, got {describe(got)}"
    if isinstance(expected, int | float | np.number):
        if isinstance(got, torch.Tensor) and got.ndim == 0:
            return f"{at}expected a Python number, got a tensor: .item() makes one of it"
        if isinstance(got, bool) or not isinstance(got, int | float | np.number):
            return f"{at}expected the number {describe(expected)}, got {describe(got)}"
        r, a = (TOLERANCE[torch.float32][0] if rtol is None else rtol), (0.0 if atol is None else atol)
        same = (
            (math.isnan(expected) and math.isnan(got))
            or expected == got
            or abs(got - expected) <= a + r * abs(expected)
        )
        if isinstance(expected, int) and isinstance(got, int) and rtol is None and atol is None:
            same = expected == got  # counts are exact
        return None if same else f"{at}expected {describe(expected)}, got {describe(got)}"
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return f"{at}expected a dict, got {describe(got)}"
        if set(expected) != set(got):
            return f"{at}expected the keys {sorted(map(str, expected))}, got {sorted(map(str, got))}"
        pairs = [(f"{where}[{key!r}]", expected[key], got[key]) for key in expected]
    elif isinstance(expected, list | tuple):
        if not isinstance(got, list | tuple):
            return f"{at}expected a {type(expected).__name__} of {len(expected)}, got {describe(got)}"
        if len(expected) != len(got):
            return f"{at}expected {len(expected)} elements, got {len(got)}"
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(expected, got, strict=True))]
    else:
        return None if bool(expected == got) else f"{at}expected {describe(expected)}, got {describe(got)}"
    for place, a, b in pairs:
        found = difference(a, b, rtol, atol, place)
        if found:
            return found
    return None


def _tensors(expected, got, rtol, atol, at) -> str | None:
    if expected.shape != got.shape:
        return f"{at}expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if expected.dtype != got.dtype:
        return f"{at}expected dtype {_dtype(expected)}, got {_dtype(got)}"
    if expected.device != got.device:
        return f"{at}expected device {expected.device}, got {got.device}"
    r, a = TOLERANCE.get(expected.dtype, (0.0, 0.0))
    if expected.is_floating_point() or expected.is_complex():  # integers and masks are exact
        r, a = (r if rtol is None else rtol), (a if atol is None else atol)
    wrong = ~torch.isclose(got, expected, rtol=r, atol=a, equal_nan=True)
    if not wrong.any():
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    count = f"{int(wrong.sum())} of {wrong.numel()} values differ, first at {list(first)}" if first else "the value"
    return f"{at}{count}: expected {expected[first].item():.6g}, got {got[first].item():.6g}"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def describe(x, limit: int = 90) -> str:
    """A value in one short line: `int64 (2, 7) [[5, 9, ...`, `3`, `'text'`, `a function`."""
    if isinstance(x, torch.Tensor | np.ndarray):
        name = _dtype(x) if isinstance(x, torch.Tensor) else str(x.dtype)
        values = str(x.tolist()) if math.prod(x.shape) <= 24 else ""
        text = f"{name} {tuple(x.shape)} {values}".rstrip()
    elif isinstance(x, torch.nn.Module):
        text = f"a {type(x).__name__} module"
    elif isinstance(x, list | tuple | dict) and len(x) > 24:
        text = f"a {type(x).__name__} of {len(x)}"
    elif isinstance(x, type):
        text = f"the class {x.__name__}"
    elif callable(x):
        text = "a function"
    else:
        try:
            if is_dataclass(x):  # each field shortened by itself: the last ones may be those that matter
                parts = (f"{one.name}={describe(getattr(x, one.name), limit)}" for one in fields(x) if one.repr)
                return f"{type(x).__qualname__}({', '.join(parts)})"
            text = repr(x)
        except Exception:  # noqa: BLE001 (a learner's class may do anything)
            text = f"a {type(x).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def copy(x):
    """A copy that the learner may spoil: tensors, arrays, containers and modules are copied, the rest is shared."""
    if isinstance(x, torch.nn.Module):
        return copying.deepcopy(x)
    if isinstance(x, torch.Tensor):
        return x.detach().clone().requires_grad_(x.requires_grad)
    if isinstance(x, np.ndarray):
        return x.copy()
    if isinstance(x, dict):
        return {key: copy(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(copy(value) for value in x) if type(x) in (list, tuple) else x
    return x


def unchanged(before, after) -> bool:
    """Whether a function left its inputs as they were (only what `copy` copies can change)."""
    if isinstance(before, torch.nn.Module):
        a, b = before.state_dict(), after.state_dict()
        return unchanged(dict(a), dict(b))
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(unchanged(before[key], after[key]) for key in before)
    if type(before) in (list, tuple) and type(after) in (list, tuple):
        return len(before) == len(after) and all(unchanged(a, b) for a, b in zip(before, after, strict=True))
    if isinstance(before, torch.Tensor | np.ndarray | str | int | float | type(None)):
        return difference(before, after, rtol=0, atol=0) is None
    return before is after
