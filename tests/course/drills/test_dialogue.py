import itertools
import random

import drill_items as bank
import pytest

from finetune_lab.course.drills import dialogue, judge
from finetune_lab.course.drills.dialogue import converse
from finetune_lab.course.drills.judge import Verdict


def replies(*texts):
    texts = iter(texts)
    return lambda ask: next(texts)


def lead(item, *texts, tries=2, seed=0):
    return bank.lead(converse(item, random.Random(seed), tries), replies(*texts))


@pytest.fixture
def judged(monkeypatch):
    """`judged("wrong", "ok")`: what the judge says of code and bugs, in this order; no process is started."""

    def script(*statuses):
        verdicts = itertools.chain(Verdict(s, f"it is {s}", float(s == "ok"), "printed this") for s in statuses)
        monkeypatch.setattr(judge, "code", lambda item, source: next(verdicts))
        monkeypatch.setattr(judge, "bug", lambda item, line, text: next(verdicts))

    return script


@pytest.mark.parametrize(
    ("said", "score", "rating"), [("again", 0, 1), ("2", 0.5, 2), ("good", 1, 3), ("e", 1, 4), ("GOOD", 1, 3)]
)
def test_a_card_shows_answer_mistake_and_follow_ups_before_it_is_rated(said, score, rating):
    item = bank.card()
    told, _, outcome = lead(item, "my answer", "", "how?", said)
    texts = [one.text for one in told]
    order = [texts.index(item.question), texts.index(item.answer), texts.index(item.follow_ups[0].answer)]
    assert order == sorted(order) and item.wrong.says in "".join(texts) and item.wrong.because in "".join(texts)
    assert (outcome.score, outcome.rating) == (score, rating)


def test_a_rating_that_is_none_is_asked_again():
    told, asked, outcome = bank.lead(
        converse(bank.card(), random.Random(0)), replies("", "", "perfect", "", "9", "good")
    )
    assert [ask.form for ask in asked] == ["reveal", "reveal", "choice", "choice", "choice", "choice"]
    assert outcome.rating == 3 and any("'perfect' is not a rating" in one.text for one in told)


@pytest.mark.parametrize(
    ("answers", "score", "rating"),
    [
        (["right"], 1.0, 3),
        (["1", "right"], 0.75, 2),
        (["1", "2"], 0.0, 1),
        (["?"], 0.0, 1),
        (["1", "?"], 0.0, 1),
        (["", "abc", "12 GB", "nan", "right"], 1.0, 3),
    ],
)
def test_a_number_is_good_at_once_hard_later_and_what_is_no_answer_costs_nothing(answers, score, rating):
    item = bank.number()
    right = bank.right_number(item, 0)
    told, asked, outcome = lead(item, *[right if a == "right" else a for a in answers])
    assert (outcome.score, outcome.rating) == (score, rating) and len(asked) == len(answers)
    assert told[-1].role == "answer" and right in told[-1].text


def test_a_typical_wrong_number_gets_its_hint():
    item = bank.number()
    told, _, _ = lead(item, str(2 * int(bank.right_number(item, 0))), "?")
    assert told[1] == dialogue.Tell("You doubled it.", "wrong")


def test_numbers_are_drawn_from_the_seed():
    item = bank.number()
    texts = [lead(item, "?", seed=seed)[0][0].text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_in_a_mock_interview_one_wrong_answer_is_the_end():
    _, asked, outcome = lead(bank.number(), "1", tries=1)
    assert len(asked) == 1 and outcome.rating == 1


@pytest.mark.parametrize(
    ("statuses", "answers", "score", "rating"),
    [
        (["ok"], ["3", "return 1"], 1.0, 3),
        (["wrong", "ok"], ["1", "x", "3", "return 1"], 0.75, 2),
        (["wrong", "wrong"], ["3", "x", "1", "y"], 0.5, 2),
        (["wrong", "wrong"], ["1", "x", "2", "y"], 0.0, 1),
        (["again", "not attempted", "ok"], ["3", "(", "3", "  return total - 1", "3", "z"], 1.0, 3),
        ([], ["?"], 0.0, 1),
        ([], ["3", "?"], 0.0, 1),
        (["ok"], ["0", "4", "three", "", "²", "3", "return 1"], 1.0, 3),
    ],
)
def test_a_bug_is_named_and_repaired_and_naming_it_is_half(judged, statuses, answers, score, rating):
    judged(*statuses)
    told, asked, outcome = lead(bank.bug(), *answers)
    assert (outcome.score, outcome.rating) == (score, rating) and len(asked) == len(answers)
    assert " 3      return total - 1" in told[0].text and "return total + 1" in told[-1].text


@pytest.mark.parametrize(
    ("statuses", "score", "rating"),
    [
        (["ok"], 1.0, 3),
        (["wrong", "ok"], 0.75, 2),
        (["wrong", "wrong"], 0.0, 1),
        (["not attempted", "again", "ok"], 1.0, 3),
    ],
)
def test_code_is_checked_until_two_answers_were_wrong(judged, statuses, score, rating):
    judged(*statuses)
    told, asked, outcome = lead(bank.code(), *["def f(): ..."] * len(statuses))
    assert (outcome.score, outcome.rating) == (score, rating)
    assert {ask.initial for ask in asked} == {bank.code().starter}
    assert "printed this" in told[1].text and "def completion_labels" in told[-1].text


@pytest.mark.parametrize(
    ("ticks", "score", "rating"), [("yyyyy", 1.0, 3), ("nnnnn", 0.0, 1), ("nnyyn", 4 / 9, 2), ("yynnn", 3 / 9, 1)]
)
def test_a_case_counts_the_weight_of_the_points_that_were_said(ticks, score, rating):
    item = bank.case()
    told, _, outcome = lead(item, "my notes", *ticks)
    assert outcome.score == pytest.approx(score) and outcome.rating == rating
    assert outcome.detail == {"ticked": [n for n, tick in enumerate(ticks) if tick == "y"]}
    assert all(any(point.point in one.text and point.why in one.text for one in told) for point in item.rubric)


def test_a_tick_is_yes_or_no():
    told, _, outcome = lead(bank.case(), "", "maybe", "yes", "no", "2", "1", "N")
    assert "'maybe' is no answer here" in "".join(one.text for one in told)
    assert outcome.detail == {"ticked": [0, 3]}


@pytest.mark.parametrize("item", bank.one_of_each(), ids=lambda item: item.kind)
def test_a_conversation_can_be_closed_at_every_question_and_stores_nothing(item, judged, own_home):
    judged(*["wrong"] * 9)
    for stop in range(1, 5):
        conversation, asked = converse(item, random.Random(0)), 0
        step = next(conversation)
        while asked < stop:
            try:
                if isinstance(step, dialogue.Ask):
                    asked += 1
                    if asked == stop:
                        break
                    step = conversation.send("1")
                else:
                    step = next(conversation)
            except StopIteration:
                break
        conversation.close()
    assert not own_home.exists()
