import json
import os
import subprocess
import sys
import time

import pytest

from finetune_lab.course import predict, progress
from finetune_lab.errors import UserError

WRITER = """
import sys
from finetune_lab.course import progress
first, count = int(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
for i in range(first, first + count):
    progress.record_exercise(f"{i:04d}.1", "ok", "x" * 200)
"""


def writer(home, first, count):
    env = {**os.environ, "FINETUNE_LAB_HOME": str(home)}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(first), str(count)], env=env, stdout=subprocess.PIPE)


def test_two_notebooks_at_once_lose_no_verdict(own_home):
    both = [writer(own_home, 0, 200), writer(own_home, 1000, 200)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert len(progress.load()["exercises"]) == 400


def test_a_killed_writer_leaves_a_whole_file_and_no_lock(own_home, capsys):
    progress.record_exercise("01.1", "ok")
    for round in range(6):
        process = writer(own_home, 1000 * round, 10_000)
        process.stdout.readline()
        time.sleep(0.03 + 0.05 * round)
        process.kill()  # SIGKILL where there is one
        process.wait()
        json.loads(progress.path().read_text())
        progress.record_exercise("01.2", "wrong")
    data = progress.load()["exercises"]
    assert data["01.1"]["ok"] and data["01.2"]["tries"] == 6 and len(data) > 10
    assert "damaged" not in capsys.readouterr().out
    assert not list(own_home.glob("*corrupt*"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "exercises": {"a": 3}, "predictions": {}}']
)
def test_a_damaged_file_is_moved_aside_and_never_replaced(text, own_home, capsys):
    own_home.mkdir()
    progress.path().write_text(text)
    progress.record_exercise("01.1", "ok")
    progress.path().write_text(text)
    assert progress.load()["exercises"] == {}
    assert [(own_home / f"progress.json.corrupt-{n}").read_text() for n in (1, 2)] == [text, text]
    assert capsys.readouterr().out.count("was damaged; it was moved") == 2


def test_bytes_that_are_no_text_are_a_damaged_file(own_home):
    own_home.mkdir()
    progress.path().write_bytes(b"\xff\xfe\x00")
    assert progress.load()["exercises"] == {}


def test_a_newer_schema_is_left_alone_with_one_sentence(own_home):
    own_home.mkdir()
    text = '{"schema": 2, "people": {}}'
    progress.path().write_text(text)
    with pytest.raises(UserError, match="newer finetune-lab"):
        progress.record_exercise("01.1", "ok")
    assert progress.path().read_text() == text


def test_right_once_stays_right_and_tries_are_counted():
    for verdict in ("not attempted", "wrong", "ok", "wrong"):
        progress.record_exercise("01.1", verdict, "labels")
    entry = progress.load()["exercises"]["01.1"]
    assert entry["ok"] and entry["tries"] == 3 and entry["last"] == "wrong" and entry["title"] == "labels"


def test_nothing_recorded_yet_creates_no_file(own_home):
    assert progress.load() == {"schema": 1, "exercises": {}, "predictions": {}} and not own_home.exists()


def test_the_first_prediction_is_the_one_that_counts(capsys):
    predict.number("01-p1", 30, 87.5, unit="%")
    predict.number("01-p1", 87.5, 87.5, unit="%")
    assert capsys.readouterr().out.splitlines() == [
        "01-p1: you said 30 %, it is 87.5 %: off by 57.5 points.",
        "01-p1: you said 87.5 %, it is 87.5 %: exactly right.",
    ]
    entry = progress.load()["predictions"]["01-p1"]
    assert (entry["first"], entry["guess"], entry["error"]) == (30, 87.5, 57.5)


@pytest.mark.parametrize("guess", [..., None])
def test_without_a_guess_the_value_is_shown_and_nothing_stored(guess, capsys):
    predict.number("01-p1", guess, 5)
    out = capsys.readouterr().out
    assert "write a number first" in out and "It is 5." in out and not progress.path().exists()


@pytest.mark.parametrize("guess", ["30%", float("nan"), True])
def test_a_guess_that_is_no_number_gives_nothing_away(guess, capsys):
    predict.number("01-p1", guess, 5)
    out = capsys.readouterr().out
    assert "a prediction is a number" in out and "5" not in out and not progress.path().exists()


def test_a_choice_is_right_or_not(capsys):
    for guess in (..., "up", "rises", "falls"):
        predict.choice("01-p2", guess, "falls", ["rises", "falls"])
    lines = capsys.readouterr().out.splitlines()
    assert "write one of 'rises', 'falls' first" in lines[0] and "yours is 'up'" in lines[1]
    assert lines[2].endswith("not what you expected.") and lines[3].endswith("right.")
    assert progress.load()["predictions"]["01-p2"]["right"] is False


def test_predictions_take_tensors(capsys):
    import torch

    predict.number("01-p1", torch.tensor(2), torch.tensor(2.5))
    assert "off by 0.5" in capsys.readouterr().out
    assert progress.load()["predictions"]["01-p1"]["actual"] == 2.5
