"""The instructor's guide says what the lessons say, and its minutes add up."""

import itertools
import re

import pytest

from finetune_lab.cli import main
from finetune_lab.course import guide, guide_agenda, guide_lesson, guide_predictions
from finetune_lab.course.lessons import course_root, lessons
from finetune_lab.errors import UserError


@pytest.fixture(scope="module")
def sheets():
    return {lesson.number: guide_lesson.sheet(lesson) for lesson in lessons(course_root())}


def test_the_committed_guide_is_what_the_lessons_say_now():
    root = course_root()
    committed = (root / guide.NAME).read_text(encoding="utf-8")
    assert committed == guide.page(root), "docs/instructor.md is stale: run `finetune-lab guide` and commit it"


def test_a_section_is_never_shorter_than_its_exercises_predictions_and_reading(sheets):
    for one in sheets.values():
        assert one.minutes >= one.header, one.lesson.name
        for section in one.sections:
            stops = sum(3 if stop.kind == "prediction" else stop.minutes for stop in section.stops)
            assert section.minutes >= max(1, stops + section.words / 150 + section.lines / 30), section.title


def test_without_the_exercises_for_home_a_lesson_keeps_to_its_first_cell(sheets):
    for one in sheets.values():
        out = guide_lesson.home(one)
        assert bool(out) == (one.minutes > one.header and one.lesson.number != "00"), one.lesson.name
        if out:
            assert one.minutes - sum(stop.minutes for stop in out) <= one.header
            assert one.minutes - sum(stop.minutes for stop in out[:-1]) > one.header, "one too many"
            said = guide.run_sheet(one)
            assert f"{one.minutes - one.header} minutes more than the {one.header}" in said
            assert all(f"{stop.id} {stop.title} (" in said for stop in out)


def test_minutes_that_a_header_names_beyond_its_parts_are_shared_out():
    found = [guide_lesson.Section("short", words=150), guide_lesson.Section("long", words=450)]
    guide_lesson.time(found, 12)
    assert [section.minutes for section in found] == [3, 9]
    guide_lesson.time(found, 2)
    assert [section.minutes for section in found] == [1, 3]


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


def test_a_choice_has_its_options_in_the_guide_and_the_outcome_among_them(sheets):
    stops = [stop for one in sheets.values() for section in one.sections for stop in section.stops if stop.choices]
    texts = "".join(one.lesson.source.read_text(encoding="utf-8") for one in sheets.values())
    assert len(stops) == texts.count("predict.choice(")
    assert all(stop.answer in stop.choices for stop in stops)
    page = "".join(guide.run_sheet(one) for one in sheets.values())
    assert all(f"“{choice}”" in page for stop in stops for choice in stop.choices)


def test_options_that_cannot_be_read_are_refused_in_one_sentence():
    good = 'SIZES = {"few": 1, "many": 9}\npredict.choice("99-p1", guess, outcome, options=list(SIZES))'
    assert guide_predictions.choices(good, "99-p1", "here") == ("few", "many")
    with pytest.raises(UserError, match=r"^here: write the options of 99-p1 as a list of strings"):
        guide_predictions.choices(good.replace("list(SIZES)", "sorted(names)"), "99-p1", "here")


@pytest.mark.parametrize("told, said", [
    ("38.89 %", "39 %"), ("4.047 % of the entries", "4 % of the entries"), ("0.3143 GB", "0.31 GB"), ("99.99 %", "100 %"),
    ("20.6 of 174", "21 of 174"), ("1,152 tokens", "1,152 tokens"), ("3 turns", "3 turns"), ("'as many'", "as many"),
])  # fmt: skip
def test_outcomes_are_rounded_as_people_say_them(told, said):
    assert guide_predictions.spoken(told) == said


def test_a_question_about_the_cell_above_brings_what_it_printed(sheets):
    stops = {stop.id: stop for one in sheets.values() for section in one.sections for stop in section.stops}
    assert "with the mask" in stops["01-p3"].above and stops["01-p3"].above in guide.run_sheet(sheets["01"])
    assert "1152 tokens / 5 layers" in stops["02-p1"].above and "weights: 10.2 MB" in stops["02-p1"].above
    assert "Is the lamp free?" in stops["01-p1"].above and "you said" not in stops["01-p1"].above
    assert not any(stop.above.startswith("[") for stop in stops.values())


def test_questions_for_the_room_name_a_command_that_writes_the_answers(sheets, tmp_path, capsys):
    command = re.search(r"`finetune-lab (drill export [^`]+)`", guide.run_sheet(sheets["03"]))[1]
    out = tmp_path / "drills.md"
    assert main(command.replace("drills.md", str(out)).split()) == 0
    text = " ".join(out.read_text(encoding="utf-8").split())
    card = sheets["03"].cards[0]
    assert " ".join(card.question.split()) in text and " ".join(card.wrong.because.split()) in text


@pytest.mark.parametrize("title", list(guide_agenda.WORKSHOPS))
def test_an_agenda_teaches_every_minute_once_ends_in_time_and_has_its_breaks(title, sheets):
    for taught in guide_agenda.days(title, sheets):
        rows = guide_agenda.day(taught)
        for before, after in itertools.pairwise(rows):
            assert before.start + before.minutes == after.start
        work = sum(row.minutes for row in rows if row.what.startswith("**"))
        assert work == sum(sheet.minutes for sheet in taught)
        long = work > guide_agenda.LONG_DAY
        assert rows[-1].start + rows[-1].minutes <= guide_agenda.END[long]
        assert sum(row.what.startswith("lunch") for row in rows) == long
        stretch, exercises = 0, 0
        for row in rows:
            lesson = row.what.startswith("**")
            stretch = stretch + row.minutes if lesson else 0
            exercises = exercises + len(row.stops.split()) if lesson else 0
            assert stretch <= 85 and exercises <= 5


@pytest.mark.parametrize("title", list(guide_agenda.WORKSHOPS))
def test_what_an_agenda_leaves_out_is_named_and_nothing_else_is_missing(title, sheets):
    text = guide_agenda.workshop(title, sheets)
    taught = {sheet.lesson.number for day in guide_agenda.days(title, sheets) for sheet in day}
    said, tables = text.split("| From |", 1)
    for number, one in sheets.items():
        assert (f"{number} {one.title} (" in said) == (number not in taught)
        for stop in (stop for section in one.sections for stop in section.stops if stop.kind == "exercise"):
            there = re.search(rf"[ ,]{re.escape(stop.id)}[ ,]", tables) is not None
            assert there == (number in taught and stop.id not in guide_agenda.HOME[title])
            assert (f"{stop.id} {stop.title} (" in said) == (stop.id in guide_agenda.HOME[title])


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
    ("Ten steps of four. Then more.\n\n### Exercise\nHow many? Guess.", "Then more. How many? Guess."),
    ("Other.\n\n## New\nHow many?", "How many?"),
    ("Nothing here.", ""),
])  # fmt: skip
def test_the_question_is_the_last_one_with_what_leads_to_it(text, asked):
    assert guide_predictions.question(text) == asked


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
