"""Which questions to ask: the filters, a practice session by what is due, a mock interview by the clock.

Functions over items of the bank (schema.py), FSRS cards (state.py) and a seeded `random.Random`. Nothing is printed
or asked here; `keep` stores one answer, the rest is pure. What the answers say afterwards is report.py's.
"""

import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from fsrs import Card

from finetune_lab.course import topics as topic_list
from finetune_lab.course.drills import schema, state
from finetune_lab.course.drills.dialogue import Outcome
from finetune_lab.course.drills.schema import Item
from finetune_lab.errors import UserError

_WARM_UP = ("card", "number", "bug", "code", "case")  # the order in which a mock interview makes sure of each kind


@dataclass(frozen=True)
class Answer:
    """One question of a session. `score` is 0 to 1; `rating` as in state.py; `seconds` it took."""

    item: Item
    score: float
    rating: int
    seconds: float


def select(
    items: Iterable[Item],
    *,
    topic: str | None = None,
    level: str | None = None,
    kind: str | None = None,
    lesson: str | None = None,
) -> list[Item]:
    """The items that fit every filter that is given. `topic` is part of a topic's id or name, or a tag.

    Raises:
        UserError: a filter that no item of the bank fits, or filters that fit nothing together.
    """
    chosen = every = list(items)
    for name, value, known in (("level", level, schema.LEVELS), ("kind", kind, tuple(schema.KINDS))):
        if value is not None and value not in known:
            raise UserError(f"--{name} {value!r}: expected one of {', '.join(known)}")
    if topic is not None:
        hits = {one.id for one in topic_list.find(known_topics().values(), topic)} if topic.strip() else set()
        word = topic.strip().casefold()
        tagged = {item.id for item in every if word and (word in item.topic or word in map(str.casefold, item.tags))}
        chosen = [item for item in every if item.topic in hits or item.id in tagged]
        if not chosen:
            known = sorted({item.topic for item in every})
            raise UserError(f"--topic {topic!r} fits no drill; topics with drills: {', '.join(known) or 'none'}")
    if lesson is not None:
        number = lesson.zfill(2)
        known = sorted({item.lesson for item in every})
        if number not in known:
            raise UserError(f"--lesson {lesson!r}: no drill belongs to it; lessons with drills: {', '.join(known)}")
        chosen = [item for item in chosen if item.lesson == number]
    chosen = [item for item in chosen if level in (None, item.level) and kind in (None, item.kind)]
    if not chosen:
        raise UserError("no drill fits all of these filters together; leave one out.")
    return chosen


@functools.cache
def known_topics() -> dict[str, topic_list.Topic]:
    """The topics of the course by id; read once, because reading takes most of a second."""
    return {topic.id: topic for topic in topic_list.load()}


def queue(items: Sequence[Item], cards: dict[str, Card], now: datetime, rng: random.Random) -> tuple[list[Item], str]:
    """(items in the order to ask them, what they are). Due ones first, longest overdue first, then new ones, easy
    before hard, in random order inside a level. With neither, everything, by the date it comes due."""
    due = sorted((item for item in items if item.id in cards and cards[item.id].due <= now), key=_due(cards))
    new = [item for item in items if item.id not in cards]
    rng.shuffle(new)
    new.sort(key=lambda item: schema.LEVELS.index(item.level))
    if due or new:
        return due + new, f"{len(due)} due, {len(new)} new"
    early = sorted(items, key=_due(cards))
    when = cards[early[0].id].due.astimezone().strftime("%Y-%m-%d %H:%M")
    return early, f"nothing is due before {when} and nothing is new, so these come early"


def _due(cards: dict[str, Card]):
    return lambda item: (cards[item.id].due, item.id)


def fitting(items: Iterable[Item], minutes: float) -> list[Item]:
    """The items in their order, leaving out each that no longer fits into the minutes.

    Raises:
        UserError: not one fits.
    """
    items, chosen, left = list(items), [], minutes
    for item in items:
        if item.minutes <= left:
            chosen.append(item)
            left -= item.minutes
    if not chosen:
        shortest = min(item.minutes for item in items)
        raise UserError(f"{minutes:g} minutes are too few: the shortest of these drills takes {shortest}.")
    return chosen


def interview(items: Sequence[Item], minutes: float, rng: random.Random) -> list[Item]:
    """A mock interview: each kind once if the minutes allow, then kinds in turn, topics as different as can be.

    Easy questions come first, as in a real interview. The minutes of all together are at most `minutes`.

    Raises:
        UserError: not one item fits.
    """
    fitting(items, minutes)
    pool = list(items)
    rng.shuffle(pool)
    chosen: list[Item] = []
    left, idle = minutes, 0
    for kind in itertools.cycle(_WARM_UP):
        used = Counter(item.topic for item in chosen)
        fits = [i for i in pool if i.kind == kind and i.minutes <= left and i not in chosen]
        if fits:
            one = min(fits, key=lambda item: used[item.topic])  # the pool is shuffled: the first of the least used
            chosen.append(one)
            left, idle = left - one.minutes, 0
        else:
            idle += 1
        if idle == len(_WARM_UP):
            break
    return sorted(chosen, key=lambda item: (schema.LEVELS.index(item.level), _WARM_UP.index(item.kind)))


def keep(item: Item, outcome: Outcome, seconds: float, mock: str | None = None) -> Answer:
    """Store one answer in the log and return it. `mock`: when the interview that it belongs to began."""
    detail = {"kind": item.kind, "score": outcome.score, "minutes": item.minutes, **outcome.detail}
    state.record(item.id, outcome.rating, seconds, {**detail, "mock": mock} if mock else detail)
    return Answer(item, outcome.score, outcome.rating, seconds)
