import os
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from fsrs import Card, Rating, Scheduler

from finetune_lab.course.drills import state
from finetune_lab.errors import UserError

WRITER = """
import sys
from finetune_lab.course.drills import state
name, count = sys.argv[1], int(sys.argv[2])
state.reviews()
print("ready", flush=True)
for i in range(count):
    state.record(f"{name}-{i}", 3, 1.5, {"i": i})
    print(i, flush=True)
"""
START = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)


def writer(home, name, count):
    env = {**os.environ, "FINETUNE_LAB_HOME": str(home)}
    return subprocess.Popen([sys.executable, "-c", WRITER, name, str(count)], env=env, stdout=subprocess.PIPE)


def test_nothing_answered_yet_creates_no_file(own_home):
    assert state.reviews() == [] and not own_home.exists()


def test_a_review_comes_back_as_it_was_given():
    given = state.record("lora-count", 2, 12.5, {"score": 0.5, "kind": "number"}, time=START)
    assert state.reviews() == [given]
    assert given == state.Review("lora-count", START, 2, 12.5, {"score": 0.5, "kind": "number"})


def test_two_windows_of_200_reviews_each_lose_none(own_home):
    both = [writer(own_home, "a", 200), writer(own_home, "b", 200)]
    for process in both:
        process.communicate(timeout=120)
    assert [process.returncode for process in both] == [0, 0]
    items = [review.item for review in state.reviews()]
    assert sorted(items) == sorted(f"{name}-{i}" for name in "ab" for i in range(200))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is for POSIX")
def test_kill_9_never_loses_a_review_that_was_acknowledged(own_home, capsys):
    acknowledged = 0
    for round in range(6):
        process = writer(own_home, f"round{round}", 10_000)
        process.stdout.readline()
        time.sleep(0.05 + 0.06 * round)
        os.kill(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        done = said.decode().count("\n")
        acknowledged += done
        items = {review.item for review in state.reviews()}
        assert {f"round{round}-{i}" for i in range(done)} <= items
    assert acknowledged > 30, "the kills came before any work was done: this test shows nothing"
    assert len(state.reviews()) - acknowledged <= 6, "at most the one review in flight at each kill is extra"
    assert "damaged" not in capsys.readouterr().err and not list(own_home.glob("*corrupt*"))


@pytest.mark.parametrize("content", [b"not a database, not at all" * 40, b"SQLite format 3\x00" + b"\xff" * 2000])
def test_a_damaged_file_is_moved_aside_with_a_sentence_and_never_replaced(content, own_home, capsys):
    own_home.mkdir()
    for number in (1, 2):
        state.path().write_bytes(content)
        assert state.reviews() == []
        assert (own_home / f"drills.sqlite.corrupt-{number}").read_bytes() == content
    state.record("x", 3, 1)
    assert [review.item for review in state.reviews()] == ["x"]
    assert capsys.readouterr().err.count("was damaged; it was moved to") == 2


def test_a_page_overwritten_in_the_middle_is_damage_too(own_home, capsys):
    for i in range(300):
        if i == 0:
            state.record("item-0", 3, 1, {"text": "x" * 100})
            database = sqlite3.connect(state.path())
        else:
            database.execute(
                "INSERT INTO reviews (item, time, rating, seconds, detail) VALUES (?, ?, 3, 1, ?)",
                (f"item-{i}", START.isoformat(timespec="milliseconds"), '"' + "x" * 100 + '"'),
            )
    database.commit()
    database.close()
    whole = state.path().read_bytes()
    assert len(state.reviews()) == 300 and len(whole) > 5 * 4096
    state.path().write_bytes(whole[:8192] + b"\x55" * 4096 + whole[12288:])
    assert state.reviews() == [] and (own_home / "drills.sqlite.corrupt-1").exists()


def test_another_programs_database_is_not_written_into(own_home):
    own_home.mkdir()
    other = sqlite3.connect(state.path())
    other.execute("CREATE TABLE people (name TEXT)")
    other.commit()
    other.close()
    state.record("x", 3, 1)
    kept = sqlite3.connect(own_home / "drills.sqlite.corrupt-1")
    assert kept.execute("SELECT name FROM sqlite_master").fetchall() == [("people",)]
    kept.close()


def test_a_newer_schema_is_left_alone_with_one_sentence():
    state.record("x", 3, 1)
    database = sqlite3.connect(state.path())
    database.execute("PRAGMA user_version = 2")
    database.close()
    before = state.path().read_bytes()
    with pytest.raises(UserError, match="newer finetune-lab"):
        state.record("y", 3, 1)
    assert state.path().read_bytes() == before


def test_a_busy_file_is_not_taken_for_damage(monkeypatch):
    state.record("x", 3, 1)
    monkeypatch.setattr(state, "_WAIT", 0.1)
    other = sqlite3.connect(state.path(), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="locked"):
        state.record("y", 3, 1)
    other.execute("ROLLBACK")
    other.close()
    assert [review.item for review in state.reviews()] == ["x"]


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FINETUNE_LAB_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match="FINETUNE_LAB_HOME"):
        state.record("x", 3, 1)


@pytest.mark.parametrize("rating", [0, 5, True, None, "good"])
def test_a_rating_that_is_none_stores_nothing(rating, own_home):
    with pytest.raises(UserError, match="expected 1"):
        state.record("x", rating, 1)
    assert not own_home.exists()


def test_cards_are_those_that_fsrs_makes_from_the_same_ratings():
    ratings = [3, 3, 1, 2, 4, 3]
    log = [state.Review("x", START + timedelta(days=3 * i, minutes=i), r, 5) for i, r in enumerate(ratings)]
    engine, card = Scheduler(enable_fuzzing=False), Card(card_id=9)
    for review in log:
        card, _ = engine.review_card(card, Rating(review.rating), review_datetime=review.time)
    built = state.cards(log)["x"]
    assert (built.due, built.stability, built.difficulty) == (card.due, card.stability, card.difficulty)


def test_cards_depend_on_the_log_alone_in_any_order():
    for day, (item, rating) in enumerate([("a", 3), ("b", 1), ("a", 4), ("b", 3)]):
        state.record(item, rating, 1, time=START + timedelta(days=day))
    log = state.reviews()
    first, again = state.cards(log), state.cards(reversed(state.reviews()))
    assert {k: v.due for k, v in first.items()} == {k: v.due for k, v in again.items()}
    assert first["a"].due > first["b"].due, "known twice is asked later than forgotten once"


def test_reviews_written_in_two_time_zones_are_in_time_order():
    from datetime import timezone

    early = START.astimezone(timezone(timedelta(hours=8)))
    state.record("second", 3, 1, time=START + timedelta(minutes=1))
    state.record("first", 3, 1, time=early)
    assert [review.item for review in state.reviews()] == ["first", "second"]
    assert state.reviews()[0].time == START and state.reviews()[0].time.tzinfo is UTC
