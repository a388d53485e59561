"""What the learner answered, and when: one SQLite file that survives kills, two windows at once, and damage.

Where: `drills.sqlite` beside the progress file (`progress.home()`). What: the review log and nothing else,

    reviews(id, item, time, rating, seconds, detail)

`item` is the drill's id, `time` is UTC (ISO 8601, milliseconds, so that text order is time order), `rating` is 1 again,
2 hard, 3 good, 4 easy, `seconds` is how long the answer took, `detail` is JSON (score, kind, mock interview).

When to ask an item again is not stored. The FSRS card of an item (the `fsrs` package, fuzzing off, so that it is
deterministic) is rebuilt from its reviews each time: nothing can disagree with the log, and a better scheduler
tomorrow reads the same log. Items that left the bank stay in the log and are not asked.

Each review is one transaction, on disk before the next question is asked. The layout's number is `user_version`.
"""

import json
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from fsrs import Card, Rating, Scheduler

from finetune_lab.course import progress
from finetune_lab.errors import UserError

SCHEMA = 1
RATINGS = {"again": 1, "hard": 2, "good": 3, "easy": 4}
_WAIT = 30.0  # seconds that one window waits for another
_COLUMNS = ["id", "item", "time", "rating", "seconds", "detail"]
_CREATE = """CREATE TABLE reviews (
  id INTEGER PRIMARY KEY, item TEXT NOT NULL,
  time TEXT NOT NULL CHECK (julianday(time) IS NOT NULL AND time LIKE '%+00:00'),
  rating INTEGER NOT NULL CHECK (rating BETWEEN 1 AND 4),
  seconds REAL NOT NULL CHECK (seconds >= 0),
  detail TEXT NOT NULL CHECK (json_valid(detail)))"""


@dataclass(frozen=True)
class Review:
    """One answer. `time` is aware and UTC; `detail` is what the kind of drill wants to remember."""

    item: str
    time: datetime
    rating: int
    seconds: float
    detail: dict = field(default_factory=dict)


def path() -> Path:
    return progress.home() / "drills.sqlite"


def record(
    item: str, rating: int, seconds: float, detail: dict | None = None, *, time: datetime | None = None
) -> Review:
    """Append one review to the log; it is on disk when this returns.

    Raises:
        UserError: the rating is not 1 to 4, or the file cannot be written.
    """
    if rating not in RATINGS.values() or isinstance(rating, bool):
        raise UserError(f"rating {rating!r}: expected 1 (again), 2 (hard), 3 (good) or 4 (easy).")
    review = Review(item, (time or datetime.now(UTC)).astimezone(UTC), rating, max(0.0, float(seconds)), detail or {})
    with _open() as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute(
            "INSERT INTO reviews (item, time, rating, seconds, detail) VALUES (?, ?, ?, ?, ?)",
            (
                review.item,
                review.time.isoformat(timespec="milliseconds"),
                review.rating,
                round(review.seconds, 3),
                json.dumps(review.detail, sort_keys=True),
            ),
        )
        database.execute("COMMIT")
    return review


def reviews() -> list[Review]:
    """The whole log, oldest first; empty when there is no file yet."""
    if not path().exists():
        return []
    with _open() as database:
        rows = database.execute("SELECT item, time, rating, seconds, detail FROM reviews ORDER BY time, id").fetchall()
    return [Review(i, datetime.fromisoformat(t).astimezone(UTC), r, s, json.loads(d)) for i, t, r, s, d in rows]


def scheduler() -> Scheduler:
    """FSRS with its published default weights, 90 % target recall, and no fuzz: the same log gives the same dates."""
    return Scheduler(enable_fuzzing=False)


def cards(log: Iterable[Review]) -> dict[str, Card]:
    """The FSRS card of every item that was ever answered, rebuilt from the log. `card.due` is when to ask again."""
    engine, built = scheduler(), {}
    for review in sorted(log, key=lambda review: review.time):
        # fsrs wants an integer id of its own; ours is the key of the dict.
        card = built.get(review.item) or Card(card_id=len(built) + 1, due=review.time)
        built[review.item], _ = engine.review_card(card, Rating(review.rating), review_datetime=review.time)
    return built


@contextmanager
def _open() -> Iterator[sqlite3.Connection]:
    """A connection in autocommit mode to a healthy file; a damaged file is moved aside first."""
    try:
        progress.home().mkdir(parents=True, exist_ok=True)
        # The lock covers only opening: two windows must not both find the damage, or both create the table.
        with FileLock(f"{path()}.lock", timeout=_WAIT):
            database = _healthy()
    except Timeout:
        raise UserError(f"another program holds {path()}.lock; close it and try again.") from None
    except (OSError, sqlite3.OperationalError) as error:
        raise _unusable(error) from None
    try:
        yield database
    except sqlite3.DatabaseError as error:
        raise _unusable(error) from None
    finally:
        database.close()


def _unusable(error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or error
    return UserError(
        f"cannot use {path()} ({why}). Close other drill windows, free some disk space, "
        "or set FINETUNE_LAB_HOME to a folder that you may write."
    )


def _healthy() -> sqlite3.Connection:
    database = _connect()
    try:
        if _layout(database):
            return database
    except sqlite3.OperationalError:
        database.close()
        raise
    except sqlite3.DatabaseError:  # not a database, or a malformed one
        pass
    database.close()
    aside = _move_aside()
    print(f"drills: {path().name} was damaged; it was moved to {aside} and a new one starts.", file=sys.stderr)
    database = _connect()
    _layout(database)
    return database


def _connect() -> sqlite3.Connection:
    # isolation_level=None: transactions begin where we say so. The rollback journal, unlike WAL, also works in
    # home folders on a network drive.
    return sqlite3.connect(path(), timeout=_WAIT, isolation_level=None)


def _layout(database: sqlite3.Connection) -> bool:
    """Whether the file holds our table, which is created in an empty file. False: it is somebody else's or damaged.

    Raises:
        UserError: a newer finetune-lab wrote the file.
    """
    database.execute("PRAGMA synchronous = FULL")  # a review is on disk before COMMIT returns
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA:
        raise UserError(
            f"{path()} was written by a newer finetune-lab (schema {version}, this one knows {SCHEMA}); "
            "it was left as it is. Upgrade finetune-lab, or set FINETUNE_LAB_HOME to another folder."
        )
    if version == 0:
        if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return False
        database.execute("BEGIN IMMEDIATE")
        database.execute(_CREATE)
        database.execute(f"PRAGMA user_version = {SCHEMA}")
        database.execute("COMMIT")
        return True
    columns = [row[1] for row in database.execute("PRAGMA table_info(reviews)")]
    return columns == _COLUMNS and database.execute("PRAGMA quick_check").fetchone()[0] == "ok"


def _move_aside() -> Path:
    """Rename the file, and the journal of a transaction that never ended, to the first free `.corrupt-N`."""
    number = 1
    while (aside := path().with_name(f"drills.sqlite.corrupt-{number}")).exists():
        number += 1
    os.replace(path(), aside)
    journal = path().with_name("drills.sqlite-journal")
    if journal.exists():
        os.replace(journal, aside.with_name(f"{aside.name}-journal"))
    return aside
