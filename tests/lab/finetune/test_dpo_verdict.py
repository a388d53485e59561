"""Claims about the verdict of preference training: a learned preference is not a better answer, and it says so."""

import pytest

from finetune_lab.lab.finetune import verdict

BEFORE = {"accuracy": 0.5, "likelier": 0.6, "margin": 0.0, "chosen_logp": -20.0, "rejected_logp": -22.0, "words": 10.0}


def report(before=(), after=(), rows=100, unchanged=0.2):
    then = BEFORE | dict(before)
    return {
        "before": then,
        "after": then | {"accuracy": 0.9} | dict(after),
        "scored_rows": rows,
        "unchanged": unchanged,
    }


@pytest.mark.parametrize(
    ("accuracy", "rows", "word"),
    [(0.65, 200, "yes."), (0.55, 200, "not shown."), (0.2, 200, "no, the"), (1.0, 3, "not shown."), (1.0, 6, "yes.")],
)
def test_a_preference_is_learned_when_chance_does_not_explain_it(accuracy, rows, word):
    first, _ = verdict.lines(report(after={"accuracy": accuracy}, rows=rows))
    assert first.startswith(f"Preference learned: {word}")


def test_learned_and_broken_are_said_side_by_side():
    first, second = verdict.lines(report(after={"accuracy": 1.0, "chosen_logp": -60.0, "words": 25.0}))
    assert "learned: yes" in first and "perhaps worse" in second
    assert "less likely (-20.0 to -60.0 nats)" in second and "from 10.0 to 25.0 words" in second


def test_without_a_sign_no_damage_is_claimed():
    _, second = verdict.lines(report(after={"chosen_logp": -19.0, "words": 11.0}))
    assert "no sign of damage" in second and "20% of the answers are unchanged" in second


@pytest.mark.parametrize(
    ("then", "now", "word"), [(0.6, 0.9, "improved"), (0.9, 0.1, "got worse"), (0.6, 0.65, "no clear change")]
)
def test_a_rule_decides_where_there_is_one(then, now, word):
    _, second = verdict.lines(report({"good": then}, {"good": now}))
    assert second.startswith(f"Answers: {word}.")


def test_nothing_changed_is_said():
    _, second = verdict.lines(report(unchanged=1.0))
    assert "nothing changed in what it writes" in second


@pytest.mark.parametrize(("likelier", "said"), [(0.98, True), (0.9, False)])
def test_little_left_to_learn_is_said(likelier, said):
    first, _ = verdict.lines(report({"likelier": likelier}))
    assert ("Little was left to learn" in first) == said


def test_where_nothing_was_scored_there_is_no_verdict():
    assert verdict.lines({"before": {}, "after": {}, "scored_rows": 0}) == []
