"""`finetune-lab troubleshoot [WORD]`: symptom or error text, cause, test, fix, and the lesson that explains it.

The rows are in `troubleshooting.yml` beside this file; its first lines explain the fields. Each row either has a test
that produces its symptom, or says what machine it takes.
"""

import argparse
import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from finetune_lab.course import topics
from finetune_lab.errors import UserError

ROWS = Path(__file__).with_name("troubleshooting.yml")
WIDTH = 100


@dataclass(frozen=True)
class Row:
    """One thing that goes wrong. `lesson` and `place` come from the topic."""

    id: str
    symptom: str
    cause: str
    test: str
    fix: str
    topic: str
    lesson: str
    place: str
    needs: str | None = None
    see: tuple[str, ...] = ()


def load(path: Path = ROWS) -> list[Row]:
    """Every row, in the order of the file.

    Raises:
        UserError: a field is missing, unknown or no text, or a topic or id is not as it should be; names all of them.
    """
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {topic.id: topic for topic in topics.load()}
    rows, problems, seen = [], [], set()
    for position, entry in enumerate(entries, 1):
        name = entry.get("id", f"row {position}")
        texts = {"id", "symptom", "cause", "test", "fix", "topic"}
        wrong = [f"{key}: expected text" for key in sorted(texts) if not isinstance(entry.get(key), str)]
        wrong += [f"{key}: no such field" for key in sorted(set(entry) - texts - {"needs", "see"})]
        wrong += [f"topic: {entry.get('topic')!r} is not in topics.yml"] * (entry.get("topic") not in known)
        wrong += ["id: stands twice"] * (name in seen)
        seen.add(name)
        problems += [f"{name}: {one}" for one in wrong]
        if not wrong:
            topic = known[entry["topic"]]
            fields = {**entry, "see": tuple(entry.get("see", ()))}
            rows.append(Row(**fields, lesson=f"{topic.lesson} {topic.title}", place=topic.place))
    if problems:
        raise UserError(f"{path.name}: {len(problems)} to mend:\n  " + "\n  ".join(problems))
    return rows


def find(rows: list[Row], search: str) -> list[Row]:
    """The rows that hold every word of `search` in any case; those that hold them all in the symptom come first."""
    words = search.casefold().replace("`", "").split()

    def holds(text: str) -> bool:
        return all(word in text.casefold().replace("`", "") for word in words)

    found = [row for row in rows if holds(f"{row.id} {row.symptom} {row.cause} {row.test} {row.fix} {row.topic}")]
    return sorted(found, key=lambda row: not holds(f"{row.id} {row.symptom}"))


def text(row: Row) -> str:
    """A row as a block of lines for the terminal."""
    lines = [textwrap.fill(row.symptom, WIDTH)]
    where = f"{row.lesson}: {row.place}"
    pairs = [("cause", row.cause), ("test", row.test), ("fix", row.fix), ("lesson", where)]
    pairs += [("see", link) for link in row.see]
    for label, value in pairs:
        lines.append(textwrap.fill(value, WIDTH, initial_indent=f"  {label:<7}", subsequent_indent=" " * 9))
    return "\n".join(lines)


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "troubleshoot",
        help="symptom or error text: cause, test, fix",
        description="What goes wrong in fine-tuning: symptom, cause, how to find out in a minute, and the fix.",
        epilog='examples:\n  finetune-lab troubleshoot nan\n  finetune-lab troubleshoot "does not require grad"\n'
        "  finetune-lab troubleshoot",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="words of the symptom or of the error text")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=command)


def command(args: argparse.Namespace) -> int:
    """`finetune-lab troubleshoot`; 1 when nothing matches."""
    search = " ".join(args.words)
    rows = find(load(), search)
    if args.json:
        print(json.dumps({"count": len(rows), "rows": [asdict(row) for row in rows]}, ensure_ascii=False, indent=2))
    elif rows:
        print("\n\n".join(text(row) for row in rows))
        print(f"\n{len(rows)} {'row' if len(rows) == 1 else 'rows'}")
    else:
        print(f"no row matches {search!r}: try one word of the error, or no word for all {len(load())} rows")
    return 0 if rows else 1
