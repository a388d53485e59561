"""The topics of the course: one list for the glossary, the drill tags and `finetune-lab topics`.

The list is `topics.yml` beside this file; its first lines explain the fields. This module reads it, refuses it
with every problem named, prints it, and compares it with the lesson sources. It knows nothing of notebooks or drills.
"""

import argparse
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from finetune_lab.errors import UserError

TOPICS = Path(__file__).with_name("topics.yml")
STATUSES = ("planned", "written", "later")
MAX_LINE = 160
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same safe subset, eight times as fast where it was built
_ROW = re.compile(r"S\d{3}")


@dataclass(frozen=True)
class Topic:
    """One idea of the course. `title` is the lesson's; `rows` and `drills` are row ids of the source notes."""

    id: str
    en: str
    zh: str
    line: str
    lesson: str
    title: str
    status: str
    section: str | None = None
    reason: str | None = None
    rows: tuple[str, ...] = ()
    drills: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where to read about it: the section, or that there is nothing to read yet."""
        if self.status == "written":
            return self.section
        return "planned" if self.status == "planned" else f"later: {self.reason}"


def load(path: Path = TOPICS) -> list[Topic]:
    """Every topic, in the order of the file.

    Raises:
        UserError: the file is not as its header says; names the id and the field of every problem found.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), LOADER)
    except yaml.YAMLError as error:
        raise UserError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    lessons, entries = (document.get(k) if isinstance(document, dict) else None for k in ("lessons", "topics"))
    if not isinstance(lessons, dict) or not isinstance(entries, list):
        raise UserError(f"{path.name}: expected a mapping `lessons` and a list `topics`")
    problems = [
        f"lessons: {number!r}: {title!r}, expected two digits in quotes and a title"
        for number, title in lessons.items()
        if not (isinstance(number, str) and re.fullmatch(r"\d\d", number) and isinstance(title, str))
    ]
    for position, entry in enumerate(entries, 1):
        name = entry.get("id", f"topic number {position}") if isinstance(entry, dict) else f"topic number {position}"
        problems += [f"{name}: {problem}" for problem in _entry_problems(entry, lessons)]
    if not problems:
        problems += _repeated("id", (entry["id"] for entry in entries))
        problems += _repeated(
            "rows or drills", (row for entry in entries for key in ("rows", "drills") for row in entry.get(key, ()))
        )
    if problems:
        raise UserError(f"{path.name}: {len(problems)} to mend:\n  " + "\n  ".join(problems))
    return [
        Topic(
            title=lessons[entry["lesson"]],
            **{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()},
        )
        for entry in entries
    ]


def _entry_problems(entry: object, lessons: dict) -> Iterable[str]:
    """What is wrong with one entry of the file: `field: what was given, what was expected`."""
    if not isinstance(entry, dict):
        yield f"expected fields, not {entry!r}"
        return
    known = {field.name for field in fields(Topic)} - {"title"}
    for key in sorted(set(entry) - known, key=str):
        yield f"{key}: no such field, expected one of {', '.join(sorted(known))}"
    for key in ("id", "en", "zh", "line", "lesson", "status", "section", "reason"):
        optional = key in ("section", "reason") and key not in entry
        if not optional and not (isinstance(entry.get(key), str) and entry[key].strip()):
            yield f"{key}: {entry.get(key)!r}, expected text (numbers and words such as `no` need quotes)"
    for key in ("rows", "drills", "aliases"):
        value = entry.get(key, [] if key != "rows" else None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            yield f"{key}: {value!r}, expected a list of texts, such as [] or [S018]"
        elif key != "aliases":
            yield from (f"{key}: {row!r}, expected S and three digits" for row in value if not _ROW.fullmatch(row))
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(entry.get("id"))):
        yield f"id: {entry.get('id')!r}, expected kebab-case such as label-shift"
    if len(str(entry.get("line"))) > MAX_LINE or "\n" in str(entry.get("line")):
        yield f"line: {len(str(entry['line']))} characters, expected one line of at most {MAX_LINE}"
    if isinstance(entry.get("lesson"), str) and entry["lesson"] not in lessons:
        yield f"lesson: {entry['lesson']!r}, expected one of {', '.join(map(str, lessons))}"
    if entry.get("status") not in STATUSES:
        yield f"status: {entry.get('status')!r}, expected one of {', '.join(STATUSES)}"
    for status, key in (("written", "section"), ("later", "reason")):
        if entry.get("status") == status and not entry.get(key):
            yield f"{key}: missing, expected because status is {status}"


def _repeated(field: str, values: Iterable[str]) -> list[str]:
    return [f"{value}: {field}: stands {n} times, expected once" for value, n in Counter(values).items() if n > 1]


def find(topics: Iterable[Topic], search: str) -> list[Topic]:
    """The topics whose id, names or aliases hold every word of `search`, in English or Chinese, in any case."""
    words = _fold(search).split()
    return [t for t in topics if all(word in _fold(" ".join((t.id, t.en, t.zh, *t.aliases))) for word in words)]


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def glossary(topics: Iterable[Topic] | None = None) -> list[tuple[str, str, str, str]]:
    """Rows of a markdown table, sorted by English name: English, Chinese, one line, lesson (`02 (planned)`)."""
    topics = sorted(load() if topics is None else topics, key=lambda topic: topic.en.casefold())
    return [
        (_cell(t.en), _cell(t.zh), _cell(t.line), t.lesson if t.status == "written" else f"{t.lesson} ({t.status})")
        for t in topics
    ]


def _cell(text: str) -> str:
    """Plain text as a markdown cell: `2*d*r` must not turn italic and `|` must not end the cell; code stays."""
    return re.sub(r"(`[^`]*`)|([*_|<])", lambda match: match[1] or "\\" + match[2], text)


def section_problems(topics: Iterable[Topic], solutions: Path) -> list[str]:
    """Where the list and the lesson sources `solutions/NN_*.py` disagree; empty when they agree.

    Once a lesson has a source, each of its topics must be `written`, under a heading that is there, or `later`
    with a reason: nothing stays `planned` unnoticed.
    """
    sources = {path.name[:2]: path for path in sorted(solutions.glob("[0-9][0-9]_*.py"))}
    found = {number: headings(path.read_text(encoding="utf-8")) for number, path in sources.items()}
    problems = []
    for topic in topics:
        if topic.lesson not in sources:
            if topic.status != "planned":
                problems.append(f"{topic.id}: status {topic.status}, but lesson {topic.lesson} has no source")
            continue
        source = sources[topic.lesson].name
        if topic.status == "planned":
            problems.append(f"{topic.id}: planned, but {source} exists: make it written, or later with a reason")
        elif topic.status == "written" and _heading(topic.section) not in found[topic.lesson]:
            problems.append(f"{topic.id}: no heading {topic.section!r} in {source}")
    return problems


def headings(source: str) -> set[str]:
    """The headings of the markdown cells of a percent-format lesson, as `_heading` writes them."""
    found, markdown, fenced = set(), False, False
    for line in source.splitlines():
        if line.startswith("# %%"):
            markdown, fenced = "[markdown]" in line, False
        elif line.startswith("# ```"):
            fenced = not fenced
        elif markdown and not fenced and (match := re.match(r"# #{1,6} (.+)", line)):
            found.add(_heading(match[1]))
    return found


def _heading(text: str) -> str:
    """Without its number, emphasis, backticks and case: `3. The *chat* template` is `the chat template`."""
    return re.sub(r"^[\d.]+[:.]?\s+", "", re.sub(r"[`*]", "", text).strip()).casefold()


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "topics",
        help="every topic of the course and the lesson that teaches it",
        description="Every topic of the course: what it is in one line, and the lesson and section that teach it.",
        epilog="examples:\n  finetune-lab topics --lesson 01\n  finetune-lab topics --search padding\n"
        "  finetune-lab topics --search 遗忘 --zh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lesson", metavar="NN", help="only the topics of this lesson")
    parser.add_argument("--search", metavar="WORD", help="only names that hold these words, in English or Chinese")
    parser.add_argument("--zh", action="store_true", help="show the Chinese names as well")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=command)


def command(args: argparse.Namespace) -> int:
    """`finetune-lab topics`; 1 when nothing matches."""
    topics = load()
    if args.lesson is not None:
        number = args.lesson.zfill(2) if args.lesson else ""
        known = sorted({topic.lesson for topic in topics})
        if number not in known:
            raise UserError(f"no lesson {args.lesson!r}: expected a number from {known[0]} to {known[-1]}")
        topics = [topic for topic in topics if topic.lesson == number]
    if args.search is not None:
        topics = find(topics, args.search)
    if args.json:
        print(json.dumps({"count": len(topics), "topics": [asdict(t) for t in topics]}, ensure_ascii=False, indent=2))
    elif topics:
        print(_table(topics, args.zh))
    else:
        print(f"no topic matches {args.search!r}: try part of a word, in English or Chinese")
    return 0 if topics else 1


def _table(topics: list[Topic], zh: bool) -> str:
    lines, lesson = [], None
    for topic in topics:
        if topic.lesson != lesson:
            lesson = topic.lesson
            lines += [f"{topic.lesson}  {topic.title}"]
        chinese = f" ({topic.zh})" if zh else ""
        lines += [f"  {topic.en}{chinese}  [{topic.place}]", f"      {topic.line}"]
    counts = Counter(topic.status for topic in topics)
    summary = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    note = " (planned: the lesson is not written yet)" if counts["planned"] else ""
    return "\n".join([*lines, "", f"{len(topics)} topics: {summary}{note}"])
