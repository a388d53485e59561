import asyncio
import random

import drill_items as bank
import pytest
from ipywidgets import Output

from finetune_lab.course import execute
from finetune_lab.course.drills import dialogue, judge, state, widget
from finetune_lab.course.drills.judge import Verdict
from finetune_lab.course.drills.widget import Drills
from finetune_lab.errors import UserError


def buttons(drills):
    """The buttons that are to be seen, by name."""
    return {b.description: b for b in drills.children[-1].children if b.layout.display != "none"}


def press(drills, name):
    buttons(drills)[name].click()


def stored():
    return [(review.item, review.rating) for review in state.reviews()]


def enter(drills, text):
    """Type into the answer line and press Enter."""
    drills._line.value = text
    drills._line._handle_string_msg(None, {"event": "submit"}, None)


def test_a_number_is_answered_by_keyboard_and_stored():
    drills = Drills(items=[bank.number()], seed=4)
    assert "has a" in drills._view.value and set(buttons(drills)) == {"Check", "Give up", "Skip", "Stop"}
    enter(drills, "abc")
    assert "is not a number" in drills._view.value and stored() == []
    enter(drills, bank.right_number(bank.number(), 4))
    assert stored() == [("a-number", 3)] and "[ok]" in drills._view.value and "stored: good" in drills._status.value
    assert set(buttons(drills)) == {"Next question", "Stop"}
    press(drills, "Next question")
    assert "1 answered" in drills._view.value and buttons(drills) == {}


def test_enter_after_the_answer_was_stored_answers_nothing():
    drills = Drills(items=[bank.number()], seed=4)
    press(drills, "Give up")
    enter(drills, "5")
    assert stored() == [("a-number", 1)]


def test_enter_waits_for_the_text_that_the_browser_sends_after_the_key():
    async def browser():
        drills = Drills(items=[bank.number()], seed=4)
        drills._line._handle_string_msg(None, {"event": "submit"}, None)
        drills._line._handle_string_msg(None, {"event": "submit"}, None)
        drills._line.value = bank.right_number(bank.number(), 4)
        await asyncio.sleep(2 * widget.ENTER_SECONDS)
        return drills

    drills = asyncio.run(browser())
    assert stored() == [("a-number", 3)] and drills._line.continuous_update is drills._area.continuous_update is False


def test_a_card_is_revealed_and_rated_with_buttons():
    drills = Drills(items=[bank.card()])
    press(drills, "Show the answer")
    assert r"\(B A x\)" in drills._view.value and "The learning rate." in drills._view.value
    press(drills, "Show the answer")
    assert set(buttons(drills)) == {*dialogue.RATINGS, "Skip", "Stop"}
    press(drills, "easy")
    assert stored() == [("a-card", 4)]


def test_code_is_written_in_an_area_and_a_second_try_goes_on_from_the_first(monkeypatch):
    verdicts = iter([Verdict("wrong", "not yet"), Verdict("ok", "right", 1.0)])
    seen = []
    monkeypatch.setattr(judge, "code", lambda item, source: seen.append(source) or next(verdicts))
    drills = Drills(items=[bank.code()])
    assert drills._area.value == bank.code().starter and drills._area.layout.display is None
    drills._area.value = "first"
    press(drills, "Check")
    assert drills._area.value == "first" and "not yet" in drills._view.value
    drills._area.value = "second"
    press(drills, "Check")
    assert seen == ["first", "second"] and stored() == [("a-code", 2)]


def test_a_bug_asks_for_the_line_and_then_shows_that_line_to_repair(monkeypatch):
    monkeypatch.setattr(judge, "bug", lambda item, line, text: Verdict("ok", f"line {line}: {text}", 1.0))
    drills = Drills(items=[bank.bug()])
    enter(drills, "3")
    assert drills._area.value == "    return total - 1"
    drills._area.value = "    return total + 1"
    press(drills, "Check")
    assert stored() == [("a-bug", 3)]


def test_a_case_is_ticked_with_yes_and_no():
    drills = Drills(items=[bank.case()], minutes=20)
    press(drills, "Show the answer")
    for word in ("yes", "no", "yes", "yes", "yes"):
        press(drills, word)
    assert state.reviews()[0].detail["ticked"] == [0, 2, 3, 4]


def test_skipping_and_stopping_store_nothing():
    drills = Drills(items=[bank.card("one"), bank.card("two")])
    press(drills, "Skip")
    assert drills._status.value.count("2 of 2") == 1
    press(drills, "Stop")
    assert stored() == [] and "Stopped." in drills._status.value and buttons(drills) == {}


def test_a_mock_interview_ends_with_its_score_card():
    items = [bank.number(f"n{i}", minutes=3) for i in range(9)]
    drills = Drills(items=items, mock=9, seed=1)
    for _ in range(3):
        enter(drills, "1")
        press(drills, "Next question")
    assert "Score card: 0 % of what was asked (3 of 3 questions" in drills._view.value
    assert "reread lesson 01" in drills._view.value and len(stored()) == 3
    assert all(review.detail["mock"] for review in state.reviews())


def test_time_that_is_over_ends_the_session(monkeypatch):
    drills = Drills(items=[bank.number("a"), bank.number("b")], seed=1)
    now = widget.time.monotonic()
    monkeypatch.setattr(widget.time, "monotonic", lambda: now + 21 * 60)
    press(drills, "Skip")
    assert "Time is up: 1 not reached." in drills._status.value


def test_a_crash_is_shown_and_not_swallowed(monkeypatch):
    def broken(*_):
        raise RuntimeError("no <such> thing")

    drills = Drills(items=[bank.number()], seed=4)
    monkeypatch.setattr(judge, "number", broken)
    with pytest.raises(RuntimeError):  # ipywidgets' own dispatcher would only log it
        drills._answer("5")
    assert "RuntimeError: no &lt;such&gt; thing" in drills._status.value and "Next question" in buttons(drills)


def test_a_log_that_cannot_be_written_is_a_sentence_in_the_widget(monkeypatch, tmp_path):
    drills = Drills(items=[bank.number()], seed=4)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_LAB_HOME", str(tmp_path / "file" / "home"))
    press(drills, "Give up")
    assert "FINETUNE_LAB_HOME" in drills._status.value and "Next question" in buttons(drills)


def test_what_a_learner_types_is_shown_as_text():
    drills = Drills(items=[bank.number()], seed=4)
    enter(drills, "<img src=x onerror=alert(1)>")
    assert "<img" not in drills._view.value and "&lt;img" in drills._view.value


@pytest.mark.parametrize("item", bank.one_of_each(), ids=lambda item: item.kind)
def test_without_a_kernel_the_first_question_stands_there_with_its_answer_folded(item, own_home):
    data = Drills(items=[item], seed=4)._repr_mimebundle_()
    assert {execute.WIDGET, "text/html", "text/plain"} == set(data)
    assert "<details><summary>Show the answer</summary>" in data["text/html"]
    assert data["text/html"].index("<details>") > data["text/html"].index(item.id if item.kind == "card" else "min:")
    assert not own_home.exists(), "showing a question stores nothing"


def test_the_still_is_the_same_for_the_same_seed():
    stills = [Drills(items=bank.one_of_each(), seed=s)._repr_mimebundle_()["text/html"] for s in (1, 1, 2, 3, 4)]
    assert stills[0] == stills[1] and len(set(stills)) > 1


def test_there_is_no_output_widget():
    def inside(widget):
        return [widget, *(one for child in getattr(widget, "children", ()) for one in inside(child))]

    assert not any(isinstance(widget, Output) for widget in inside(Drills(items=bank.one_of_each())))


def test_the_widget_asks_what_the_terminal_would():
    drills = Drills(items=[bank.number(f"n{i}") for i in range(9)], seed=7)
    rng = random.Random(7)
    from datetime import UTC, datetime

    from finetune_lab.course.drills import session

    planned = session.fitting(
        session.queue([bank.number(f"n{i}") for i in range(9)], {}, datetime.now(UTC), rng)[0], 20
    )
    assert [item.id for item in drills._planned] == [item.id for item in planned]


@pytest.mark.parametrize("wrong", [{"level": "hard"}, {"topic": "astrology"}, {"minutes": 1}, {"mock": 1}])
def test_bad_choices_are_refused_with_a_sentence(wrong):
    with pytest.raises(UserError):
        Drills(items=[bank.card()], **wrong)
