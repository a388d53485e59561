"""The engine behind `answer = check.<exercise>(answer)`: a verdict, a hint for the mistake, and no dead ends.

An exercise is defined in `finetune_lab/course/exercises/lNN.py`:

    from finetune_lab.course.checks import Wrong, case, exercise
    from finetune_lab.methods import chat

    def cases(draw):                       # draw: a seeded random.Random with a few helpers, see Draw
        for batch, length in draw.sizes(4, 2, 9):
            yield case(draw.ints(0, 50, batch, length), start=3)

    def shifted(ids, start): ...           # what people get wrong

    exercise("01.2", "completion labels", chat.completion_labels, cases,
             wrong=[Wrong(shifted, "off by one: do not shift here, the model shifts the labels itself"), ...])

It is then called `check.completion_labels` (the reference's name, or `name=`). Three kinds of answers:
- a function: called on each case;
- a class or module: say how it is used, `call=lambda cls, weight, x: cls(weight)(x)`;
- a value: `reference=<the value>`, `name=`; no cases and no call; the learner's stub is `...`.

A failing answer is compared with each known-wrong answer on all cases; the one that gives the same outcomes lends
its hint. So does the only one that gives the same where the answer raised no error (a second mistake). Otherwise
`diagnose(case, expected, got)` may return a hint; otherwise the first failing case is described.

FINETUNE_LAB_CHECK: `learn` (default) never raises, records the verdict and returns the reference for a wrong answer;
`solved` raises CheckError unless right; `unsolved` raises unless not attempted. Only KeyboardInterrupt passes through.
"""

import inspect
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune_lab.course import progress
from finetune_lab.course.compare import copy, describe, difference, unchanged

IN_PLACE = "you changed the input in place: work on a copy (for a tensor: x.clone())"
REGISTRY: dict[str, "Exercise"] = {}


class CheckError(AssertionError):
    """A verdict that the mode (`solved` or `unsolved`) does not allow."""


class Draw(random.Random):
    """The seeded source of a case's data: `random.Random` and helpers for tensors."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def sizes(self, n: int, low: int, high: int, dims: int = 2) -> list[tuple[int, ...]]:
        """`n` shapes with all sizes different inside a shape (never square: a transpose cannot hide)."""
        return [tuple(self.sample(range(low, high + 1), dims)) for _ in range(n)]

    def ints(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self.torch)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.torch).to(dtype)

    def device(self) -> torch.device:
        """A device of this machine: the CPU, or by chance the GPU if there is one."""
        return torch.device(self.choice(["cpu", "cuda"]) if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)


def case(*args, **kwargs) -> Case:
    """One call of the learner's function."""
    return Case(args, kwargs)


@dataclass(frozen=True)
class Wrong:
    """A known-wrong answer and the hint for whoever makes that mistake: what is wrong, in one sentence."""

    answer: Any
    hint: str

    @property
    def name(self) -> str:
        return getattr(self.answer, "__name__", repr(self.answer))


@dataclass(frozen=True)
class Outcome:
    """What an answer did on one case: a value or an error, and whether it changed its inputs."""

    value: Any = None
    error: BaseException | None = None
    changed: bool = False


@dataclass(frozen=True)
class Exercise:
    id: str
    title: str
    reference: Any
    cases: Callable[[Draw], Iterable[Case]]
    wrong: list[Wrong]
    name: str
    call: Callable
    kind: str
    compare: Callable[[Any, Any], str | None]
    diagnose: Callable[[Case, Any, Any], str | None] | None
    mutates: bool


def exercise(
    id: str,
    title: str,
    reference: Any,
    cases: Callable[[Draw], Iterable[Case]] | None = None,
    *,
    wrong: list[Wrong],
    name: str | None = None,
    call: Callable | None = None,
    compare: Callable | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    diagnose: Callable | None = None,
    mutates: bool = False,
) -> Exercise:
    """Define an exercise. `id` is `NN.k`: lesson and number.

    `compare(expected, got)` returns None or a sentence; the default is `compare.difference` with `rtol` and `atol`
    (by dtype when not given). `mutates=True` allows the answer to change its inputs.
    """
    kind = "class" if inspect.isclass(reference) else "function" if callable(reference) else "value"
    if kind != "value" and cases is None or kind == "class" and call is None:
        raise ValueError(f"exercise {id}: a function needs cases; a class needs cases and call")
    name = name or getattr(reference, "__name__", None)
    if name is None or name in REGISTRY and REGISTRY[name].id != id:
        raise ValueError(f"exercise {id}: needs a name= that no other exercise has, got {name!r}")
    if any(other.id == id and other.name != name for other in REGISTRY.values()):
        raise ValueError(f"exercise {id} is defined twice")
    if cases is None:
        cases, call = (lambda draw: [Case()]), (lambda value: value)
    REGISTRY[name] = Exercise(
        id,
        title,
        reference,
        cases,
        list(wrong),
        name,
        call or (lambda fn, *args, **kwargs: fn(*args, **kwargs)),
        kind,
        compare or (lambda expected, got: difference(expected, got, rtol, atol)),
        diagnose,
        mutates,
    )
    return REGISTRY[name]


@dataclass(frozen=True)
class Verdict:
    status: str  # ok | wrong | not attempted
    text: str  # what follows the title
    answer: Any  # the learner's when ok, else the reference


def outcome(ex: Exercise, answer: Any, one: Case, seed: int) -> Outcome:
    """Run one case on copies of its inputs, with torch and random seeded and put back afterwards."""
    args, kwargs = copy(one.args), copy(one.kwargs)
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            value = ex.call(answer, *args, **kwargs)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a learner's code may raise anything)
        return Outcome(error=error)
    finally:
        random.setstate(state)
    return Outcome(value, changed=not ex.mutates and not unchanged([one.args, one.kwargs], [args, kwargs]))


def _differs(ex: Exercise, expected: Any, got: Any) -> str | None:
    try:
        return ex.compare(expected, got)
    except Exception as error:  # noqa: BLE001 (so may comparing what it returned)
        return f"expected {describe(expected)}, got {describe(got)} ({type(error).__name__} while comparing)"


def _right(ex: Exercise, expected: Outcome, got: Outcome) -> bool:
    if expected.error is not None or got.error is not None:  # the words of an error are the learner's own
        return type(expected.error) is type(got.error)
    return expected.changed == got.changed and _differs(ex, expected.value, got.value) is None


def _same_mistake(ex: Exercise, wrong: Outcome, got: Outcome) -> bool:
    if wrong.error is not None or got.error is not None:
        return type(wrong.error) is type(got.error) and str(wrong.error) == str(got.error)
    return _right(ex, wrong, got)


def _not_attempted(answer: Any, first: Outcome) -> bool:
    # torch raises NotImplementedError too, but always with a message; the stub's has none
    return answer is ... or (type(first.error) is NotImplementedError and not first.error.args)


def _type_problem(ex: Exercise, answer: Any) -> str | None:
    if ex.kind == "function" and not callable(answer):
        return f"expected a function, got {describe(answer)}: pass the function itself, without ()"
    if ex.kind == "class" and not inspect.isclass(answer):
        return f"expected a class, got {describe(answer)}: pass the class itself, without ()"
    return None


def judge(ex: Exercise, answer: Any, seed: int) -> Verdict:
    """The verdict on one answer, without printing or recording. The same seed gives the same cases."""
    if answer is ...:
        return Verdict("not attempted", "continuing with the reference", ex.reference)
    problem = _type_problem(ex, answer)
    if problem:
        return Verdict("wrong", problem, ex.reference)
    cases = list(ex.cases(Draw(seed)))
    expected = [outcome(ex, ex.reference, one, seed) for one in cases]
    got = [outcome(ex, answer, cases[0], seed)]
    if _not_attempted(answer, got[0]):
        return Verdict("not attempted", "continuing with the reference", ex.reference)
    got += [outcome(ex, answer, one, seed) for one in cases[1:]]
    right = [_right(ex, a, b) for a, b in zip(expected, got, strict=True)]
    if all(right):
        return Verdict("ok", f"{len(cases)}/{len(cases)} cases" if ex.kind != "value" else "right", answer)
    return Verdict("wrong", _hint(ex, cases, expected, got, right, seed), ex.reference)


def _hint(
    ex: Exercise, cases: list[Case], expected: list[Outcome], got: list[Outcome], right: list[bool], seed: int
) -> str:
    partly = []
    for wrong in ex.wrong:
        outcomes = [outcome(ex, wrong.answer, one, seed) for one in cases]
        same = [
            ok and _right(ex, a, w) or not ok and _same_mistake(ex, w, g)
            for ok, a, w, g in zip(right, expected, outcomes, got, strict=True)
        ]
        if all(same):
            return wrong.hint
        explains = any(s and not ok for s, ok in zip(same, right, strict=True))
        if explains and all(s or g.error is not None for s, g in zip(same, got, strict=True)):
            partly.append(wrong.hint)
    if len(partly) == 1:
        return partly[0]
    index = right.index(False)
    one, want, have = cases[index], expected[index], got[index]
    both = want.error is None and have.error is None
    if both and have.changed and _differs(ex, want.value, have.value) is None:
        return IN_PLACE
    if ex.diagnose and both:
        try:
            hint = ex.diagnose(one, want.value, have.value)
        except Exception:  # noqa: BLE001 (a diagnosis that trips over a strange answer says nothing)
            hint = None
        if hint:
            return hint
    if have.error is not None:
        lines = str(have.error).strip().splitlines()
        what = f"raised {type(have.error).__name__}{': ' + lines[0][:200] if lines else ''}"
    elif want.error is not None:
        what = f"expected a {type(want.error).__name__} ({want.error}), it returned {describe(have.value)}"
    elif have.value is None and want.value is not None:
        what = "returned None: is a `return` missing?"
    else:
        what = _differs(ex, want.value, have.value)
    if ex.kind == "value":
        return "not yet: work it out again"  # the expected value would give the answer away
    in_place = f"\n    Also, {IN_PLACE}." if have.changed else ""
    return (
        f"{sum(right)}/{len(cases)} cases. Case {index + 1}: {what}\n"
        f"    input: {_inputs(ex, one)}\n"
        f"    the same cases again: check.{ex.name}({ex.name}, seed={seed}){in_place}"
    )


def _inputs(ex: Exercise, one: Case) -> str:
    try:
        bound = inspect.signature(ex.reference).bind(*one.args, **one.kwargs).arguments
    except (TypeError, ValueError):
        bound = {**{f"argument {i + 1}": arg for i, arg in enumerate(one.args)}, **one.kwargs}
    return ", ".join(f"{key} = {describe(value)}" for key, value in bound.items()) or "none"


def check(ex: Exercise, answer: Any, seed: int | None = None) -> Any:
    """Judge, print, record, and return the answer to go on with. See the module's docstring for the modes."""
    mode = os.environ.get("FINETUNE_LAB_CHECK", "learn")
    if mode not in ("learn", "solved", "unsolved"):
        raise CheckError(f"FINETUNE_LAB_CHECK is {mode!r}; it must be learn, solved or unsolved")
    if seed is None:
        seed = random.SystemRandom().randrange(100_000) if mode == "learn" else 0
    if answer is ex.reference and ex.kind != "value":  # the name was rebound by an earlier run of this very line
        verdict = Verdict("not attempted", "this is the reference; run the cell with your own first", answer)
    else:
        verdict = judge(ex, answer, seed)
    number = ".".join(part.lstrip("0") or "0" for part in ex.id.split("."))
    if verdict.status == "not attempted":
        line = f"[ ] {number} not attempted: {verdict.text}"
    else:
        line = f"[{'ok' if verdict.status == 'ok' else 'x'}] {number} {ex.title}: {verdict.text}"
    print(line)
    if mode == "learn":
        try:
            progress.record_exercise(ex.id, verdict.status, ex.title)
        except Exception as error:  # noqa: BLE001 (a full disk must not stop a lesson)
            print(f"    (not recorded: {error})")
    elif verdict.status != {"solved": "ok", "unsolved": "not attempted"}[mode]:
        raise CheckError(line)
    return verdict.answer
