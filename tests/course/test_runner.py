import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import lesson_fixture as fixture
import nbformat
import pytest

from finetune_lab.cli import main
from finetune_lab.course import build, exercises, predict, progress, runner
from finetune_lab.course.lessons import lessons


@pytest.fixture
def lesson(tmp_path):
    lesson = lessons(fixture.source_file(tmp_path / "course"))[0]
    build.build(lesson)
    return lesson


def test_run_prints_failures_saves_copies_and_leaves_the_learners_notebook_alone(lesson, tmp_path, capsys):
    notebook = nbformat.read(lesson.notebook, as_version=4)
    notebook.cells[-1].source = "raise KeyError('gone')"
    notebook.cells.append(nbformat.v4.new_code_cell("import time\ntime.sleep(60)", id="slow"))
    nbformat.write(notebook, lesson.notebook)
    before = lesson.notebook.read_bytes()
    code = main(["run", "99", "--root", str(lesson.root), "--json", "--timeout", "15", "--save", str(tmp_path / "out")])
    report = json.loads(capsys.readouterr().out)
    assert code == 1 and report["failed"] == 1
    row = report["rows"][0]
    assert (row["lesson"], row["cells"], row["failures"]) == ("99_masks", 5, 2)
    assert row["first"] == {"cell": "99-005", "error": "KeyError: 'gone'"}
    assert lesson.notebook.read_bytes() == before
    saved = nbformat.read(tmp_path / "out" / "99_masks.ipynb", as_version=4)
    assert "no prediction yet" in saved.cells[2].outputs[0].text


def test_a_good_run_ends_with_0_and_a_table(lesson, capsys):
    assert main(["run", "--root", str(lesson.root), "--tree", "solutions"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"99_masks +\d+\.\d +5 +0\n1 lessons, 0 failed, 0\.\d minutes, model tiny", out)


@pytest.mark.parametrize("words, says", [
    (["run", "07"], "there is no lesson '07'"), (["run", "--timeout", "0"], "--timeout is 0"),
    (["run", "--model", "no-such-model"], "no-such-model"), (["run", "--save", "notebooks"], "another folder"),
    (["reset", "07"], "there is no lesson '07'"), (["reset"], "or all of them by --all"),
    (["reset", "99", "--all"], "not both"), (["reset", "99", "--progress"], "only together with --all"),
    (["build", "07"], "there is no lesson '07'"),
    (["status", "--root", "nowhere"], "no lessons in"), (["lint", "07"], "there is no lesson '07'"),
])  # fmt: skip
def test_bad_input_ends_with_2_and_one_sentence(words, says, lesson, capsys, monkeypatch):
    monkeypatch.chdir(lesson.root)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_missing_or_damaged_notebook_is_named_with_the_fix(lesson, capsys):
    lesson.notebook.write_text("{")
    assert main(["run", "99", "--root", str(lesson.root)]) == 2
    assert "finetune-lab reset 99" in capsys.readouterr().err
    lesson.notebook.unlink()
    assert main(["run", "99", "--root", str(lesson.root)]) == 2
    assert "finetune-lab build 99" in capsys.readouterr().err


def test_reset_keeps_every_version_of_the_learners_work(lesson):
    fresh = lesson.notebook.read_bytes()
    assert runner.reset(lesson) is None
    versions = ["one", "two", "three"]  # all within the same second
    for text in versions:
        lesson.notebook.write_text(text)
        assert runner.reset(lesson).read_text() == text
        assert lesson.notebook.read_bytes() == fresh
    kept = sorted(path.name for path in lesson.notebook.parent.glob("99_masks.mine-*.ipynb"))
    assert len(kept) == 3 and all(re.fullmatch(r"99_masks\.mine-\d{8}-\d{6}(-\d)?\.ipynb", name) for name in kept)


def test_reset_says_what_it_did(lesson, capsys):
    command = ["reset", "99", "--root", str(lesson.root)]
    main(command)
    lesson.notebook.write_text("mine")
    main(command)
    lesson.notebook.unlink()
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert (
        "already as it was delivered" in lines[0] and "yours is 99_masks.mine-" in lines[1] and "it is back" in lines[2]
    )


def test_status_tells_ok_tried_not_yet_and_predictions(lesson, registry, capsys, monkeypatch):
    monkeypatch.setattr(exercises, "titles", lambda: {one.id: one.title for one in registry.values()})
    progress.record_exercise("99.1", "ok", "hide the prompt")
    progress.record_exercise("99.2", "wrong", "a scaled layer")
    predict.number("99-p1", 4, 5.5)
    capsys.readouterr()
    assert main(["status", "--root", str(lesson.root)]) == 0
    out = capsys.readouterr().out
    assert "99_masks: 1 of 3 exercises" in out
    assert (
        "[ok] 99.1 hide the prompt" in out
        and "[x]  99.2 a scaled layer  (not right yet, tries: 1)" in out
        and "[ ]  99.3" in out
    )
    assert "99-p1: you said 4, it was 5.5: off by 1.5" in out
    assert f"recorded in {progress.path()}\n" in out
    assert main(["status", "--json", "--root", str(lesson.root)]) == 0
    states = [row["state"] for row in json.loads(capsys.readouterr().out)["lessons"][0]["exercises"]]
    assert states == ["ok", "tried", "not yet"]


def test_status_knows_every_exercise_without_loading_one():
    from finetune_lab.course import check

    assert exercises.titles() == {one.id: one.title for one in check.load_all().values()}
    code = "import sys; from finetune_lab.cli import main; main(['status']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("below", ["new", "file/home"])
def test_status_does_not_claim_a_record_that_is_not_there(below, lesson, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_LAB_HOME", str(tmp_path / below))
    assert main(["status", "--root", str(lesson.root)]) == 0
    assert capsys.readouterr().out.endswith(f"nothing is recorded yet in {tmp_path / below}\n")


@pytest.mark.parametrize("command", ["run", "status", "reset", "build", "lint"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"example: finetune-lab {command}" in capsys.readouterr().out


def test_reset_all_is_for_the_next_person_and_loses_nothing(lesson, capsys):
    lesson.notebook.write_text("mine")
    progress.record_exercise("99.1", "ok", "hide the prompt")
    assert main(["reset", "--all", "--progress", "--root", str(lesson.root)]) == 0
    assert "the old one is" in capsys.readouterr().out
    assert [path.read_text() for path in lesson.notebook.parent.glob("99_masks.mine-*.ipynb")] == ["mine"]
    assert progress.load()["exercises"] == {}
    kept = next(progress.home().glob("progress.mine-*.json"))
    assert "99.1" in json.loads(kept.read_text())["exercises"]
    assert main(["reset", "--all", "--progress", "--root", str(lesson.root)]) == 0
    assert "progress and drills were empty" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make", [lambda notebook: notebook.mkdir(parents=True), lambda notebook: notebook.parent.touch()]
)
def test_a_notebook_that_cannot_be_reset_is_told_and_the_rest_goes_on(make, lesson, capsys):
    first = lesson.root / "solutions" / "01_first.py"
    first.write_text(lesson.source.read_text().replace("99-p1", "01-p1"))
    bad = replace(lesson, name="01_first", root=lesson.root)
    shutil.rmtree(bad.notebook.parent)
    make(bad.notebook)
    progress.record_exercise("99.1", "ok", "hide the prompt")
    assert main(["reset", "--all", "--progress", "--root", str(lesson.root)]) == 2
    out, error = capsys.readouterr()
    whole = bad.notebook.parent.is_dir()
    assert f"{bad.notebook} was not reset: " in error and error.count("\n") == (1 if whole else 2)
    assert lesson.notebook.exists() == whole and "progress and drills start again" in out
    assert not list(lesson.root.rglob("*.mine-*"))  # no empty copy of what could not be read


def test_the_next_person_does_not_find_the_last_ones_drills(lesson, capsys):
    (progress.home() / "drills").mkdir(parents=True)
    (progress.home() / "drills" / "mine.py").write_text("x")
    (progress.home() / "drills.sqlite").write_bytes(b"log")
    assert main(["reset", "--all", "--progress", "--root", str(lesson.root)]) == 0
    said = capsys.readouterr().out
    kept = sorted(path.name for path in progress.home().iterdir() if ".mine-" in path.name)
    assert [re.sub(r"\d", "", name) for name in kept] == ["drills.mine--", "drills.mine--.sqlite"]
    assert all(name in said for name in kept)
    assert not (progress.home() / "drills").exists() and not (progress.home() / "drills.sqlite").exists()
