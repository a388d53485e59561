"""The instructor's guide says what the lessons say, and its minutes add up."""

import itertools
import re

import pytest

from finetune_lab.cli import main
from finetune_lab.course import guide, guide_agenda, guide_lesson
from finetune_lab.course.lessons import course_root, lessons


@pytest.fixture(scope="module")
def sheets():
    return {lesson.number: guide_lesson.sheet(lesson) for lesson in lessons(course_root())}


def test_the_committed_guide_is_what_the_lessons_say_now():
    root = course_root()
    committed = (root / guide.NAME).read_text(encoding="utf-8")
    assert committed == guide.page(root), "docs/instructor.md is stale: run `finetune-lab guide` and commit it"


def test_a_lessons_sections_add_up_to_its_header_and_each_takes_a_minute(sheets):
    for one in sheets.values():
        assert sum(section.minutes for section in one.sections) == one.minutes, one.lesson.name
        assert all(section.minutes >= 1 for section in one.sections), one.lesson.name


def test_every_prediction_has_its_question_and_what_it_came_to(sheets):
    stops = [stop for one in sheets.values() for section in one.sections for stop in section.stops]
    predictions = [stop for stop in stops if stop.kind == "prediction"]
    assert len(predictions) > 30
    assert [stop.id for stop in predictions if not stop.ask or not stop.answer] == []


def test_every_exercise_of_a_lesson_is_a_stop_with_minutes_and_hints(sheets):
    for one in sheets.values():
        text = one.lesson.source.read_text(encoding="utf-8")
        stops = [stop for section in one.sections for stop in section.stops if stop.kind == "exercise"]
        assert len(stops) == len(re.findall(r"= check\.\w+\(", text)), one.lesson.name
        assert all(stop.minutes > 0 and len(stop.hints) >= 3 for stop in stops)


@pytest.mark.parametrize("title", list(guide_agenda.WORKSHOPS))
def test_an_agenda_teaches_every_minute_once_without_a_gap_or_a_long_stretch(title, sheets):
    for numbers in guide_agenda.WORKSHOPS[title]:
        rows = guide_agenda.day([sheets[number] for number in numbers])
        for before, after in itertools.pairwise(rows):
            assert before.start + before.minutes == after.start
        taught = sum(row.minutes for row in rows if row.what.startswith("**"))
        assert taught == sum(sheets[number].minutes for number in numbers)
        stretch = 0
        for row in rows:
            stretch = stretch + row.minutes if row.what.startswith("**") else 0
            assert stretch <= guide_agenda.STRETCH


def test_shares_are_whole_and_add_up():
    assert guide_lesson.share(10, [1, 1, 1]) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert guide_lesson.share(0, [2.5, 1]) == [0, 0]


def test_headings_inside_code_do_not_cut_a_text():
    assert guide_lesson.pieces("a\n## One\n```\n## no\n```\n## Two") == [
        (None, "a"),
        ("One", "## One\n```\n## no\n```"),
        ("Two", "## Two"),
    ]


@pytest.mark.parametrize("text, asked", [
    ("A note. It says 30 %. Predict the share, in percent.", "A note. It says 30 %. Predict the share, in percent."),
    ("Is it?\n\n## New\nOne. Two. Three. How many? As many means five.", "Two. Three. How many? As many means five."),
    ("Nothing here.", ""),
])  # fmt: skip
def test_the_question_is_the_last_one_with_what_leads_to_it(text, asked):
    assert guide_lesson.question(text) == asked


def test_the_command_writes_checks_and_leaves_other_peoples_files_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(guide, "page", lambda root: guide.MARK + "\npage\n")
    out = tmp_path / "guide.md"
    assert main(["guide", "--out", str(out), "--check"]) == 1
    assert main(["guide", "--out", str(tmp_path)]) == 0 and (tmp_path / "instructor.md").exists()
    assert main(["guide", "--out", str(tmp_path), "--check"]) == 0
    out.write_text("mine")
    capsys.readouterr()
    assert main(["guide", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "was not made by this command" in error and error.count("\n") == 1
    assert out.read_text() == "mine"
