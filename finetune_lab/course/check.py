"""`from finetune_lab.course import check`, then `answer = check.<exercise>(answer)`.

Every exercise of the course is an attribute, found by name in `finetune_lab/course/exercises/lNN.py`. A lesson's
module is imported when one of its exercises, or one of a later lesson, is asked for.
"""

import difflib
import functools
import importlib
import pkgutil

from finetune_lab.course import checks, exercises


def lesson_modules() -> list[str]:
    """`l00`, `l01`, ...: the modules that define exercises."""
    return sorted(module.name for module in pkgutil.iter_modules(exercises.__path__) if module.name[1:].isdigit())


def load_all() -> dict[str, checks.Exercise]:
    """Every exercise of the course by name."""
    for module in lesson_modules():
        importlib.import_module(f"{exercises.__name__}.{module}")
    return checks.REGISTRY


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(name)
    for module in lesson_modules():
        if name in checks.REGISTRY:
            break
        importlib.import_module(f"{exercises.__name__}.{module}")
    if name not in checks.REGISTRY:
        close = difflib.get_close_matches(name, checks.REGISTRY, n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise AttributeError(f"there is no exercise called {name!r}{meant}")
    return functools.partial(checks.check, checks.REGISTRY[name])


def __dir__() -> list[str]:
    return sorted(load_all())
