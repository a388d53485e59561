import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta

import drill_items as bank
import matplotlib.pyplot as plt
import pytest

from finetune_lab.course import topics
from finetune_lab.course.drills import report, schema, session, state
from finetune_lab.course.drills.dialogue import Outcome
from finetune_lab.errors import UserError

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
TOPICS = topics.load()
KINDS = (bank.card, bank.number, bank.bug, bank.code, bank.case)


def many(n=60):
    """Items of every kind and level over a dozen topics."""
    some = [topic for topic in TOPICS if topic.lesson in ("01", "03", "06")][:12]
    return [
        KINDS[i % 5](
            f"item-{i}",
            topic=some[i % 12].id,
            lesson=some[i % 12].lesson,
            level=schema.LEVELS[i % 3],
            minutes=2 + i % 7,
        )
        for i in range(n)
    ]


def answered(item, score, seconds=60.0):
    return session.Answer(item, score, 3 if score > 0.5 else 1, seconds)


def log(*pairs, start=NOW - timedelta(days=10)):
    return [state.Review(item, start + timedelta(hours=i), rating, 30) for i, (item, rating) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({"topic": "completion-labels"}, {"a", "b"}),
        ({"topic": "Building LABELS"}, {"a", "b"}),
        ({"topic": "rare"}, {"c"}),
        ({"level": "expert"}, {"b", "c"}),
        ({"kind": "number"}, {"b"}),
        ({"lesson": "6"}, {"c"}),
        ({"topic": "completion-labels", "level": "expert"}, {"b"}),
        ({}, {"a", "b", "c"}),
    ],
)
def test_filters_choose_by_topic_name_tag_level_kind_and_lesson(filters, left):
    items = [
        bank.card("a"),
        bank.number("b", level="expert"),
        bank.card("c", topic="dpo", lesson="06", level="expert", tags=("Rare",)),
    ]
    assert {item.id for item in session.select(items, **filters)} == left


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ({"level": "easy"}, "expected one of basic, advanced, expert"),
        ({"kind": "quiz"}, "expected one of card, number, bug, code, case"),
        ({"topic": "astrology"}, "fits no drill; topics with drills: completion-labels"),
        ({"topic": " "}, "fits no drill"),
        ({"lesson": "77"}, "lessons with drills: 01"),
        ({"kind": "card", "level": "expert"}, "leave one out"),
    ],
)
def test_a_filter_that_fits_nothing_says_what_would(filters, says):
    with pytest.raises(UserError, match=says):
        session.select([bank.card(), bank.number(level="expert")], **filters)


def test_due_items_come_first_longest_overdue_first_then_new_ones_easy_before_hard():
    items = [bank.card(id) for id in ("later", "forgotten", "older")]
    items += [bank.card("hard", level="expert"), bank.card("easy"), bank.card("middle", level="advanced")]
    cards = state.cards(log(("older", 1), ("forgotten", 1), ("later", 4), ("later", 4), ("left-the-bank", 1)))
    order, about = session.queue(items, cards, NOW, random.Random(0))
    assert [item.id for item in order] == ["older", "forgotten", "easy", "middle", "hard"]
    assert about == "2 due, 3 new" and cards["later"].due > NOW


def test_with_nothing_due_and_nothing_new_items_come_early_and_it_is_said():
    cards = state.cards(log(("b", 4), ("a", 4), ("a", 4)))
    order, about = session.queue([bank.card("a"), bank.card("b")], cards, NOW - timedelta(days=9.9), random.Random(0))
    assert [item.id for item in order] == sorted(["a", "b"], key=lambda id: cards[id].due)
    assert about.startswith("nothing is due before 2026-")


def test_a_session_takes_what_fits_into_its_minutes():
    items = [bank.card(f"{m}-{i}", minutes=m) for i, m in enumerate((3, 10, 4, 2))]
    assert [item.minutes for item in session.fitting(items, 10)] == [3, 4, 2]
    with pytest.raises(UserError, match="the shortest of these drills takes 2"):
        session.fitting(items, 1)


@pytest.mark.parametrize("seed", range(20))
def test_a_mock_interview_has_every_kind_many_topics_no_item_twice_and_fits(seed):
    planned = session.interview(many(), 45, random.Random(seed))
    assert sum(item.minutes for item in planned) <= 45
    assert {item.kind for item in planned} == set(schema.KINDS)
    assert len({item.id for item in planned}) == len(planned)
    most = Counter(item.topic for item in planned).most_common(1)[0][1]
    assert most <= 2 and len({item.topic for item in planned}) >= len(planned) - 2
    assert 45 - sum(item.minutes for item in planned) < 2, "another question of two minutes would have fitted"
    levels = [schema.LEVELS.index(item.level) for item in planned]
    assert levels == sorted(levels)


def test_a_mock_interview_is_the_same_for_the_same_seed_and_another_for_another():
    drawn = {seed: [i.id for i in session.interview(many(), 45, random.Random(seed))] for seed in (1, 2)}
    assert drawn[1] == [i.id for i in session.interview(many(), 45, random.Random(1))] != drawn[2]


def test_a_mock_interview_of_one_kind_uses_up_the_minutes():
    planned = session.interview([bank.card(f"c{i}", minutes=5) for i in range(20)], 45, random.Random(0))
    assert len(planned) == 9


def test_the_score_card_weighs_by_minutes_and_names_weak_spots_and_sections():
    items = [
        bank.card("known", minutes=1),
        bank.number("unknown", minutes=3, topic="lora", lesson="03"),
        bank.card("cut", topic="dpo", lesson="06"),
    ]
    figures = report.score_card([answered(items[0], 1.0), answered(items[1], 0.0)], items, 45)
    assert figures["score"] == 0.25 and figures["answered"] == 2 and figures["planned"] == 3
    assert figures["not_reached"] == ["cut"] and figures["minutes_used"] == 2
    assert figures["by_kind"]["number"]["score"] == 0 and figures["by_topic"]["completion-labels"]["score"] == 1
    assert figures["weak_spots"] == ["lora"]
    assert [(place["lesson"], place["topic"]) for place in figures["reread"]] == [("03", "lora")]
    text = report.score_text(json.loads(json.dumps(figures)))
    assert "25 % of what was asked (2 of 3 questions, 2.0 of 45 minutes)" in text
    assert "weak spots: LoRA" in text and "reread lesson 03" in text and "not answered: cut" in text


def test_what_to_reread_is_the_items_section_else_that_of_its_topic():
    topic = next(topic for topic in TOPICS if topic.status == "written")
    own, inherited = bank.card("own", section="Mine"), bank.card("t", topic=topic.id, lesson=topic.lesson)
    unwritten = bank.card("u", topic=next(topic for topic in TOPICS if topic.status == "planned").id, lesson="99")
    sections = {place["topic"]: place["section"] for place in report.reread([inherited, unwritten])}
    assert sections == {topic.id: topic.section, unwritten.topic: None}
    assert [place["section"] for place in report.reread([own, own])] == ["Mine"]


def test_nothing_answered_is_no_zero_percent():
    figures = report.score_card([], [bank.card()], 45)
    assert figures["score"] is None and "nothing was answered" in report.score_text(figures)
    assert report.practice_text([], {}) == "Nothing answered, nothing stored."


def test_history_counts_days_topics_and_mock_interviews():
    items = [bank.card("a"), bank.card("b", topic="lora", lesson="03"), bank.card("never")]
    for day, (id, rating) in enumerate([("a", 1), ("a", 3), ("b", 1), ("gone", 4)]):
        state.record(id, rating, 90, time=NOW - timedelta(days=4 - day))
    state.record("a", 3, 30, {"mock": "2026-11-23T11:00:00+00:00", "score": 1.0, "minutes": 1}, time=NOW)
    state.record("b", 1, 30, {"mock": "2026-11-23T11:00:00+00:00", "score": 0.0, "minutes": 3}, time=NOW)
    figures = report.history(state.reviews(), items, NOW + timedelta(minutes=2))
    assert (figures["reviews"], figures["items_answered"], figures["items"], figures["due"]) == (6, 2, 3, 1)
    assert sum(row["reviews"] for row in figures["days"]) == 6 and figures["days"][0]["minutes"] == 1.5
    rows = {row["topic"]: row for row in figures["topics"]}
    assert rows["completion-labels"]["known"] == 1 and rows["lora"]["known"] == 0
    assert rows["completion-labels"]["recall"] > rows["lora"]["recall"]
    assert figures["mocks"] == [{"began": "2026-11-23T11:00:00+00:00", "answered": 2, "score": 0.25}]
    text = report.history_text(figures)
    assert "25 % of 2 answers" in text and "6 answers; 2 of 3 questions met, 1 due now" in text


def test_the_history_is_drawn_from_its_own_figures():
    for day in range(9):
        for n in range(day + 1):
            state.record(f"i{n}", 3 if n else 1, 10, time=NOW - timedelta(days=9 - day))
    figures = report.history(state.reviews(), [bank.card()], NOW)
    figure, alt = report.plot(figures)
    ax = figure.axes[0]
    assert "45 in all, 80 % known" in alt and "45 answers on 9 days, 80 % known" in ax.get_title(loc="left")
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == [*range(9), *[1] * 9]
    plt.close(figure)


def test_keep_stores_the_answer_with_what_the_history_needs():
    item = bank.number()
    answer = session.keep(item, Outcome(0.75, 2, {"seed": 5}), 12.0, mock="2026-11-23T11:00:00+00:00")
    (stored,) = state.reviews()
    assert (stored.item, stored.rating, stored.seconds) == (item.id, 2, 12.0) == (answer.item.id, 2, answer.seconds)
    assert stored.detail == {
        "kind": "number",
        "score": 0.75,
        "minutes": 3,
        "seed": 5,
        "mock": "2026-11-23T11:00:00+00:00",
    }
