"""The bank as an Anki deck, and as markdown for printing.

A deck that is imported again updates its cards and keeps their schedule: the guid of a note comes from the drill's id
alone, deck and note type have fixed ids, and Anki takes the newer `mod` time. That time is the newest change of the
files that the texts come from (or SOURCE_DATE_EPOCH, in seconds, for the same bytes on two machines). So the same bank
gives the same bytes, and a changed one counts as newer. A number drill stands in a deck with one draw of its numbers.

Leaves out: the schedule of `finetune-lab drill` (Anki keeps its own), media. genanki writes the collection; the zip
around it is written here, because genanki's carries the time of day.
"""

import html
import inspect
import io
import itertools
import os
import sqlite3
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import genanki

from finetune_lab.course.drills import dialogue, links, numbers, report
from finetune_lab.course.drills.render import to_html
from finetune_lab.course.drills.schema import Bug, Card, Case, Code, Item, Number
from finetune_lab.course.lessons import keep_mine, write_atomic
from finetune_lab.errors import UserError

# Never change these: Anki knows our deck and our note type by them.
DECK_ID, MODEL_ID = 1_763_830_001, 1_763_830_002
DECK = "finetune-lab interview drills"
_STYLE = """.card { font-family: sans-serif; font-size: 18px; text-align: left; color: black; background: white; }
pre { background: #f4f4f4; padding: 8px; overflow-x: auto; font-size: 15px; }
table { border-collapse: collapse; } td, th { border: 1px solid #888; padding: 3px 8px; }
.place { color: #555; font-size: 14px; }"""
_PACKAGE = Path(__file__).resolve().parents[2]


def model() -> genanki.Model:
    return genanki.Model(
        MODEL_ID,
        "finetune-lab drill",
        fields=[{"name": name} for name in ("Question", "Answer", "Place", "Id")],
        templates=[
            {
                "name": "drill",
                "qfmt": '<div class="place">{{Place}}</div>{{Question}}',
                "afmt": "{{FrontSide}}<hr id=answer>{{Answer}}",
            }
        ],
        css=_STYLE,
    )


def guid(item: Item) -> str:
    """Which note of Anki a drill is, for ever."""
    return genanki.guid_for("finetune-lab", item.id)


def newest(folders: Sequence[Path] = (_PACKAGE / "course" / "drills", _PACKAGE / "methods")) -> int:
    """When the texts last changed: seconds since 1970.

    Raises:
        UserError: SOURCE_DATE_EPOCH is set and is not a whole number of seconds.
    """
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        if not given.isdecimal():
            raise UserError(f"SOURCE_DATE_EPOCH is {given!r}; expected whole seconds since 1970.")
        return int(given)
    files = [path for folder in folders for suffix in ("*.yml", "*.py") for path in folder.rglob(suffix)]
    return int(max(path.stat().st_mtime for path in files))


def anki(items: Sequence[Item], seed: int = 0, timestamp: int | None = None) -> bytes:
    """The bytes of an .apkg with one note an item."""
    timestamp = newest() if timestamp is None else timestamp
    deck, shape = genanki.Deck(DECK_ID, DECK), model()
    for item in items:
        question, answer = texts(item, seed)
        fields = [to_html(question), to_html(answer), html.escape(report.label(item)), item.id]
        tags = [f"lesson::{item.lesson}", f"kind::{item.kind}", f"level::{item.level}", f"topic::{item.topic}"]
        deck.add_note(genanki.Note(shape, fields, sort_field=item.id, tags=tags, guid=guid(item)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "collection.anki2"
        database = sqlite3.connect(path)
        genanki.Package(deck).write_to_db(database.cursor(), timestamp, itertools.count(timestamp * 1000))
        database.commit()
        database.close()
        collection = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (("collection.anki2", collection), ("media", b"{}")):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return buffer.getvalue()


def texts(item: Item, seed: int = 0) -> tuple[str, str]:
    """(question, answer) of an item as markdown; the answer has everything that a learner sees afterwards."""
    question, parts = item.question, []
    match item:
        case Card():
            parts = [item.answer, f"**A common wrong answer:** {item.wrong.says.strip()}", item.wrong.because]
            parts += [f"**They go on:** {more.question.strip()}\n\n{more.answer}" for more in item.follow_ups]
        case Number():
            drawn = numbers.draw(item, seed)
            question = drawn.question
            parts = [f"**{numbers.show(drawn.answer)} {item.unit}**".replace(" **", "**"), drawn.solution]
        case Bug():
            question = f"{question.rstrip()}\n\n```\n{dialogue.numbered(item.snippet)}\n```"
            parts = [f"**Line {item.line}** should be\n\n```python\n{item.fix.rstrip()}\n```", item.explain]
        case Code():
            question = f"{question.rstrip()}\n\n```python\n{item.starter.rstrip()}\n```"
            parts = [f"```python\n{inspect.getsource(links.find(item.reference)).rstrip()}\n```"]
        case Case():
            rows = [f"- ({point.weight}) **{point.point.strip()}** {point.why.strip()}" for point in item.rubric]
            parts = [item.answer, "**Rubric (weight)**\n\n" + "\n".join(rows)]
    return question.strip(), "\n\n".join(part.strip() for part in [*parts, report.sources_text(item)])


def markdown(items: Sequence[Item], answers: bool = False, seed: int = 0) -> str:
    """The questions, lesson by lesson, numbered; with the answers below each when asked for."""
    titles = {place["lesson"]: place["title"] for item in items for place in report.reread([item])}
    lines, lesson = [f"# {DECK}", f"{len(items)} questions{', with answers' if answers else ''}."], None
    for number, item in enumerate(sorted(items, key=lambda item: item.lesson), 1):
        if item.lesson != lesson:
            lesson = item.lesson
            lines.append(f"## {lesson} {titles[lesson]}")
        question, answer = texts(item, seed)
        lines += [f"### {number}. {report.topic_name(item.topic)}"]
        lines += [f"*{item.kind}, {item.level}, {item.minutes} min* (`{item.id}`)", question]
        if answers:
            lines += ["**Answer**", answer]
    return "\n\n".join(line.strip() for line in lines) + "\n"


def write_anki(items: Sequence[Item], file: str, seed: int = 0) -> Path:
    """Write the deck. Raises UserError when the file cannot be one, or is something else than a deck."""
    path = target(file, ".apkg")
    if path.exists():
        try:
            ours = "collection.anki2" in zipfile.ZipFile(path).namelist()
        except (zipfile.BadZipFile, OSError):
            ours = False
        if not ours:
            raise UserError(f"{file} exists and is no Anki deck; move it away or choose another name.")
    write_bytes(path, anki(items, seed))
    return path


def write_markdown(items: Sequence[Item], file: str, *, answers: bool, seed: int = 0) -> tuple[Path, Path | None]:
    """Write the text; (its path, where the file that was there before is kept, if it was another one)."""
    path, text = target(file, ".md"), markdown(items, answers, seed)
    try:
        kept = keep_mine(path) if path.exists() and path.read_bytes() != text.encode() else None
        write_atomic(path, text)
    except OSError as error:
        raise _refused(path, error) from None
    return path, kept


def target(file: str, suffix: str) -> Path:
    """The path of a file that we may write.

    Raises:
        UserError: another suffix, a folder, or a folder that is not there.
    """
    path = Path(file)
    if path.suffix.lower() != suffix:
        raise UserError(f"{file!r}: expected a file name that ends in {suffix}")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise UserError(f"cannot write {file!r}: {what}.")
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """All of `content` or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _refused(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {str(path)!r}: {error.strerror or error}.")
