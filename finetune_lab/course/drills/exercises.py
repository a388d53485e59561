"""Where code drills get their hidden tests: the check engine of the lessons, in a registry of its own.

    from finetune_lab.course.checks import Wrong, case
    from finetune_lab.course.drills.exercises import drill

    drill("nf4_quantise", "NF4 quantise", nf4.quantise, cases, wrong=[Wrong(no_absmax, "..."), ...])

The arguments are those of `checks.exercise`, without the lesson's number. The definitions stand in `code_tests.py`.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from finetune_lab.course.checks import Case, Draw, Exercise, Wrong
from finetune_lab.course.compare import difference
from finetune_lab.errors import UserError

REGISTRY: dict[str, Exercise] = {}


def drill(
    name: str,
    title: str,
    reference: Any,
    cases: Callable[[Draw], Iterable[Case]],
    *,
    wrong: list[Wrong],
    call: Callable | None = None,
    compare: Callable | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    diagnose: Callable | None = None,
    mutates: bool = False,
) -> Exercise:
    """Define the hidden tests of a code drill. The learner's code must define `reference.__name__`.

    Raises:
        ValueError: fewer than three wrong answers, two with the same hint, a class without `call`, or a name twice.
    """
    if len({one.hint for one in wrong}) < max(3, len(wrong)):
        raise ValueError(f"drill {name}: needs three wrong answers or more, each with its own hint")
    if not callable(reference) or inspect.isclass(reference) and call is None:
        raise ValueError(f"drill {name}: the reference must be a function, or a class with call=")
    if name in REGISTRY and REGISTRY[name].reference is not reference:
        raise ValueError(f"drill {name} is defined twice")
    REGISTRY[name] = Exercise(
        id=f"D.{name}",
        title=title,
        reference=reference,
        cases=cases,
        wrong=list(wrong),
        name=reference.__name__,
        call=call or (lambda fn, *args, **kwargs: fn(*args, **kwargs)),
        kind="class" if inspect.isclass(reference) else "function",
        compare=compare or (lambda expected, got: difference(expected, got, rtol, atol)),
        diagnose=diagnose,
        mutates=mutates,
    )
    return REGISTRY[name]


def reuse(name: str, exercise: Exercise) -> Exercise:
    """A lesson's exercise as a drill: `reuse("completion_labels", check.load_all()["completion_labels"])`."""
    REGISTRY[name] = dataclasses.replace(exercise, id=f"D.{name}")
    return REGISTRY[name]


def get(name: str) -> Exercise:
    """The hidden tests called `name`.

    Raises:
        UserError: there are none.
    """
    importlib.import_module("finetune_lab.course.drills.code_tests")
    if name not in REGISTRY:
        raise UserError(f"there is no code drill {name!r}; there are: {', '.join(sorted(REGISTRY)) or 'none yet'}")
    return REGISTRY[name]
