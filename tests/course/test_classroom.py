"""What a learner hands in says nothing about the person but the name they chose; a class of such files is one table."""

import getpass
import json
import re
import time
from pathlib import Path

import pytest

from finetune_lab.cli import main
from finetune_lab.course import classroom, classroom_table, doctor, plots, progress

REPORT = {
    "ok": True,
    "versions": {"torch": "2.13.0"},
    "rows": [
        {"name": "Python", "value": f"3.11 in {Path.home()}/course", "level": "ok", "fix": ""},
        {"name": "disk", "value": f"0.2 GB free in {Path.home()}/x of {getpass.getuser()}", "level": "problem",
         "fix": "make room"},
    ],
    "tiers": [],
}  # fmt: skip


def learner(folder, name, exercises, when="2026-11-23T10:00:00+00:00", **more):
    data = {"class": 1, "name": name, "when": when, "ready": True, "problems": [], "exercises": exercises, **more}
    (folder / f"class-{name}.json").write_text(json.dumps(data) + "\n")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "handed-in"
    folder.mkdir()
    learner(folder, "anna", {"01.1": {"ok": True, "tries": 1}, "01.2": {"ok": True, "tries": 4}})
    learner(folder, "ben", {"01.2": {"ok": False, "tries": 2}},
            problems=[{"name": "memory", "value": "1 GB free", "fix": "close programs"}])  # fmt: skip
    return folder


def test_the_file_holds_verdicts_and_problems_but_neither_guesses_nor_the_account(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "examine", lambda: REPORT)
    progress.record_exercise("01.2", "wrong", "labels")
    progress.record_prediction("01-p1", 12345, 30)
    assert main(["doctor", "--class", "anna"]) == 0
    assert "no code, no guesses, no account name. Nothing was sent" in capsys.readouterr().out
    text = Path("class-anna.json").read_text()
    data = json.loads(text)
    assert data["exercises"] == {"01.2": {"ok": False, "tries": 1}}
    assert data["problems"] == [{"name": "disk", "value": "0.2 GB free in ~/x of (account)", "fix": "make room"}]
    assert "12345" not in text and str(Path.home()) + "/" not in text and text.count("\n") == 1


def test_with_json_the_file_is_printed_as_one_line_and_not_written(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "examine", lambda: REPORT)
    assert main(["doctor", "--json", "--class", "anna"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["name"] == "anna" and out.count("\n") == 1 and not list(tmp_path.glob("class-*"))


def test_what_doctor_writes_is_what_class_reads(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    progress.record_exercise("01.2", "ok", "labels")
    classroom.write("anna", REPORT)
    learners, left_out = classroom_table.collect(tmp_path)
    assert left_out == [] and learners[0]["name"] == "anna"
    assert learners[0]["exercises"] == {"01.2": {"ok": True, "tries": 1}}


def test_the_table_counts_right_exercises_wrong_tries_and_machines(folder, capsys):
    assert main(["class", str(folder), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [row["right"]["01"] for row in figures["learners"]] == [2, 0]
    assert figures["often_wrong"] == [
        {"id": "01.2", "title": "completion labels", "wrong": 5, "tried": 2, "not_right_yet": 1}
    ]
    assert main(["class", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "ben: memory: 1 GB free; fix: close programs" in out
    assert "01.2 completion labels: 1 of 2 who tried are not right yet, 5 wrong tries" in out


def test_of_two_files_with_one_name_the_newer_counts_and_it_is_said(folder, capsys):
    (folder / "later").mkdir()
    learner(folder / "later", "ben", {"01.2": {"ok": True, "tries": 3}}, when="2026-11-23T12:00:00+00:00")
    learners, left_out = classroom_table.collect(folder)
    assert learners[1]["exercises"]["01.2"]["ok"]
    assert (
        "class-ben.json and later/class-ben.json both say they are ben; later/class-ben.json counts, the newer"
        in left_out[0]
    )


def test_the_newer_file_counts_although_it_is_read_first_and_its_clock_stands_elsewhere(folder):
    (folder / "a").mkdir()
    learner(folder / "a", "ben", {"01.2": {"ok": True, "tries": 3}}, when="2026-11-23T07:30:00-03:00")
    learners, left_out = classroom_table.collect(folder)
    assert learners[1]["exercises"]["01.2"]["ok"] and "; a/class-ben.json counts" in left_out[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_files_as_powershell_writes_them_are_read(encoding, folder):
    text = (folder / "class-anna.json").read_text()
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (folder / "class-anna.json").write_bytes((mark + text).encode(encoding))
    learners, left_out = classroom_table.collect(folder)
    assert [one["name"] for one in learners] == ["anna", "ben"] and left_out == []


def test_one_broken_line_of_a_joined_file_does_not_drop_the_others(folder):
    good = [(folder / f"class-{name}.json").read_text() for name in ("anna", "ben")]
    for path in folder.iterdir():
        path.unlink()
    (folder / "all.json").write_text(good[0] + good[0][:30] + "\n\ufeff" + good[1], encoding="utf-8")
    learners, left_out = classroom_table.collect(folder)
    assert [one["name"] for one in learners] == ["anna", "ben"]
    assert left_out == ["all.json, line 2: not a file of `finetune-lab doctor --class NAME`"]


def test_names_of_files_as_windows_and_mail_make_them_are_read_and_others_are_named(folder):
    (folder / "class-anna.json").rename(folder / "class-anna.JSON")
    (folder / "class-ben.json").rename(folder / "class-ben.json.txt")
    (folder / "class-carla.docx").write_text("x")
    learners, left_out = classroom_table.collect(folder)
    assert [one["name"] for one in learners] == ["anna", "ben"]
    assert left_out == ["class-carla.docx: its name does not end in .json"]


@pytest.mark.parametrize("text", ['{"class": 2, "people": []}', '{"schema": 2, "exercises": {}}'])
def test_a_file_of_a_newer_course_is_told_apart_from_rubbish(text, folder):
    (folder / "new.json").write_text(text)
    assert classroom_table.collect(folder)[1] == [
        "new.json: made by a newer finetune-lab; update yours, then run this again"
    ]


def test_an_exercise_that_the_course_does_not_have_makes_no_column(folder, capsys):
    learner(folder, "carla", {"42.7": {"ok": True, "tries": 1}, "01.1": {"ok": True, "tries": 1}})
    figures = classroom_table.overview(*classroom_table.collect(folder))
    assert "42" not in figures["exercises"] and figures["learners"][2]["right"]["01"] == 1
    assert figures["left_out"] == ["carla: exercises that this course does not have: 42.7"]


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows cannot change its clock's zone for a process")
@pytest.mark.parametrize("when, shown", [
    ("2026-11-23T10:00:00+00:00", "2026-11-23 15:30"), (None, ""), (7, ""), ("soon", ""), ("0001-01-01", ""),
])  # fmt: skip
def test_a_time_is_shown_in_local_time_and_none_as_nothing(when, shown, folder, capsys, monkeypatch):
    learner(folder, "anna", {}, when=when)
    monkeypatch.setenv("TZ", "XXX-05:30")
    time.tzset()
    try:
        assert main(["class", str(folder)]) == 0
    finally:
        monkeypatch.undo()
        time.tzset()
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("anna"))
    assert "local time" in out and line.endswith(shown) and "None" not in line and "soon" not in line
    assert shown or re.search(r"\d/\d +$", line)  # nothing after the last lesson's count


def test_a_progress_file_and_many_lines_in_one_file_are_read(folder):
    (folder / "carla").mkdir()
    progress.record_exercise("01.1", "ok", "x")
    (folder / "carla" / "progress.json").write_bytes(progress.path().read_bytes())
    joined = "".join((folder / f"class-{name}.json").read_text() for name in ("anna", "ben"))
    for name in ("anna", "ben"):
        (folder / f"class-{name}.json").unlink()
    (folder / "all.json").write_text(joined)
    assert [one["name"] for one in classroom_table.collect(folder)[0]] == ["anna", "ben", "carla"]


@pytest.mark.parametrize("text", [
    "{", "[1]", '{"exercises": 3}', '{"exercises": {"x": {}}}', "[" * 100_000,
    '{"exercises": {"01.1": {"tries": "many"}}}', '{"exercises": {}, "problems": [1]}',
])  # fmt: skip
def test_a_file_of_something_else_is_named_and_the_others_are_shown(text, folder, capsys):
    (folder / "odd.json").write_text(text)
    assert main(["class", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "left out or replaced: odd.json: not a file of" in out and "anna" in out


def test_signs_that_steer_a_terminal_do_not_get_through(folder, capsys):
    learner(folder, "x", {}, problems=[{"name": "\x1b[2J", "value": "a\nb", "fix": ""}])
    assert main(["class", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "a b" in out


def test_the_picture_has_a_number_in_every_field_that_is_not_empty(folder):
    figure = classroom_table.draw(classroom_table.overview(*classroom_table.collect(folder)))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "2/7" in texts and figure.axes[0].get_title(loc="left")
    assert len(plots.png(figure)) > 1000


@pytest.mark.parametrize("name", [r"$\frac$ 100%", "$a", "a_b^c", "王小明", "Zoë 🙂"])
def test_every_name_can_be_drawn_without_a_warning(name, folder, tmp_path, capsys, recwarn):
    (folder / "odd.json").write_text(json.dumps({"class": 1, "name": name, "exercises": {}}))
    assert main(["class", str(folder), "--plot", str(tmp_path / "class.png")]) == 0
    assert (tmp_path / "class.png").stat().st_size > 1000 and not list(recwarn)
    out = capsys.readouterr()
    assert name in out.out and out.err == ""
    drawable = name.isascii()
    assert (f"(row 3 is {name})" in out.out) == (not drawable)


def test_the_table_is_printed_although_the_picture_cannot_be_written(folder, capsys):
    assert main(["class", str(folder), "--plot", str(folder / "no" / "class.png")]) == 2
    out = capsys.readouterr()
    assert "anna" in out.out and "cannot write" in out.err


def test_a_chinese_name_does_not_shift_the_columns(folder, capsys):
    (folder / "odd.json").write_text(json.dumps({"class": 1, "name": "王小明", "exercises": {}}))
    main(["class", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    anna, chinese = (next(line for line in lines if line.startswith(name)) for name in ("anna", "王"))
    assert anna.index("/") == chinese.index("/") + 3


@pytest.mark.parametrize("words, says", [
    (["class", ".", "--plot", "x.jpg"], "ends in .png"), (["class", ".", "--plot", "x"], "ends in .png"),
    (["class", "nowhere"], "is not a folder"), (["class", "."], "no file of a learner"),
    (["doctor", "--class", "a b"], "letters, digits"), (["doctor", "--class", "../x"], "letters, digits"),
])  # fmt: skip
def test_bad_input_ends_with_2_and_one_sentence(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
