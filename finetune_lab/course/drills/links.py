"""Does everything that the bank names exist? Topics, lessons, sections, functions, detectors, hidden tests, libraries.

`schema.load` checks the form of the bank and stays fast; this module imports what the items name.
Links to pages on the web are checked for their form only: tests run without a network.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from finetune_lab.course import topics as topic_list
from finetune_lab.course.drills.schema import Bug, Code, Item, Number
from finetune_lab.errors import UserError

DRILLS = "finetune_lab.course.drills"


def find(path: str):
    """The object that `package.module:name` names.

    Raises:
        UserError: there is no such module or name.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(f"there is no module {error.name}") from None
    except AttributeError:
        raise UserError(f"{module} has no {name}") from None


def problems(items: Iterable[Item], solutions: Path | None = None) -> list[str]:
    """`file: id: field: what is missing` for everything that is named and not there.

    solutions: the folder of the lesson sources; None takes the one of this repository. Without sources (an installed
    package) sections are not checked.
    """
    items = list(items)
    solutions = solutions or Path(__file__).resolve().parents[3] / "solutions"
    topics = {topic.id: topic for topic in topic_list.load()}
    found = []
    for item in items:
        wrong = [*_place_problems(item, topics, solutions), *_name_problems(item), *_library_problems(item)]
        found += [f"{item.file}: {item.id}: {problem}" for problem in wrong]
    return found + _title_problems(items)


def _place_problems(item: Item, topics: dict, solutions: Path) -> Iterable[str]:
    if item.topic not in topics:
        yield f"topic: there is no topic {item.topic!r} in topics.yml"
    numbers = {topic.lesson for topic in topics.values()} | {"16"}
    if item.lesson not in numbers:
        yield f"lesson: there is no lesson {item.lesson!r}"
    source = next(iter(sorted(solutions.glob(f"{item.lesson}_*.py"))), None)
    if item.section and source and not has_heading(source, item.section):
        yield f"section: no heading {item.section!r} in {source.name}"


def has_heading(source: Path, section: str) -> bool:
    headings = topic_list.headings(source.read_text(encoding="utf-8"))
    return topic_list.headings(f"# %% [markdown]\n# # {section}") <= headings


def _name_problems(item: Item) -> Iterable[str]:
    try:
        if isinstance(item, Number):
            for compute, arguments in [(item.compute, item.arguments)] + [
                (w.compute or item.compute, w.arguments if w.compute else {**item.arguments, **(w.arguments or {})})
                for w in item.wrong
            ]:
                inspect.signature(find(compute)).bind(**arguments)
        elif isinstance(item, Bug):
            find(f"{DRILLS}.detectors:{item.detector}")
        elif isinstance(item, Code):
            find(item.reference)
            from finetune_lab.course.drills import exercises

            exercises.get(item.exercise)
    except UserError as error:
        yield f"{item.kind}: {error}"
    except TypeError as error:
        yield f"arguments: {error}"


def _library_problems(item: Item) -> Iterable[str]:
    for source in item.sources:
        if source.library and not library_has(source.library):
            yield f"sources: {source.library!r} is not in the installed library"


@functools.cache
def library_has(path: str) -> bool:
    """Is `trl.SFTTrainer` there? Looks into the installed source, because importing such libraries takes seconds.

    Follows the path through folders and files as far as it goes, then looks for each name left: a definition, an
    assignment or the name in quotes (lazy modules list theirs).
    """
    package, *names = path.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        return False
    if not spec.origin.endswith(".py"):  # compiled, such as math
        return all(hasattr(importlib.import_module(package), name) for name in names)
    place = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
    while names and place.is_dir() and ((place / names[0]).is_dir() or (place / f"{names[0]}.py").is_file()):
        inner = place / names.pop(0)
        place = inner if inner.is_dir() else inner.with_suffix(".py")
    return all(_defined(name, place) for name in names)


def _defined(name: str, place: Path) -> bool:
    pattern = re.compile(rf"\b(?:class|def)\s+{name}\b|^\s*{name}\s*[:=]|[\"']{name}[\"']", re.MULTILINE)
    files = itertools.chain([place / "__init__.py"], place.rglob("*.py")) if place.is_dir() else [place]
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore") if file.is_file() else ""
        if name in text and pattern.search(text):
            return True
    return False


def _title_problems(items: list[Item]) -> list[str]:
    """One paper has one title: a second one is a typing error in the id or in the title."""
    titles = defaultdict(set)
    for item in items:
        for source in item.sources:
            if source.arxiv:
                titles[source.arxiv].add(source.title)
    return [
        f"arXiv {id}: has several titles: {sorted(names)}" for id, names in sorted(titles.items()) if len(names) > 1
    ]
