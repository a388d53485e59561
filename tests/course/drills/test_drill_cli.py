"""`finetune-lab drill` as people and pipes use it."""

import io
import json
import os
import random
import re
import subprocess
import sys
from itertools import pairwise

import drill_items as bank
import pytest

from finetune_lab import cli
from finetune_lab.course.drills import cli as drill_cli
from finetune_lab.course.drills import dialogue, judge, schema, session, state, terminal
from finetune_lab.course.drills.judge import Verdict


@pytest.fixture
def drill(monkeypatch, capsys):
    """`drill("--minutes 5", "1", "?")`: (exit code, stdout, stderr) of a run with these lines on standard input."""

    def run(options, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = cli.main(["drill", *options.split()])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def use(monkeypatch):
    """`use(items)`: these items are the bank."""
    return lambda *items: monkeypatch.setattr(schema, "load", lambda: list(items))


def stored():
    return [(review.item, review.rating) for review in state.reviews()]


def test_a_number_is_asked_checked_and_stored(drill, use):
    use(bank.number())
    seed = 5
    right = bank.right_number(bank.number(), seed)
    code, out, err = drill(f"--seed {seed}", "abc", right)
    assert code == 0 and err == "" and stored() == [("a-number", 3)]
    assert "'abc' is not a number" in out and "[ok] right" in out and "1 answered in 0.0 minutes: 1 known" in out


def test_an_item_rated_again_comes_once_more_at_the_end_and_not_a_third_time(drill, use):
    use(bank.number("one"), bank.number("two"))
    _, out, _ = drill("--seed 1", *["?"] * 6)
    asked = re.findall(r"-- \d of \d", out)
    assert asked == ["-- 1 of 2", "-- 2 of 3", "-- 3 of 4", "-- 4 of 4"]
    assert sorted(stored()) == [("one", 1)] * 2 + [("two", 1)] * 2


@pytest.mark.parametrize("last", [[], ["q"], ["quit"]])
def test_the_end_of_the_input_and_q_stop_cleanly_and_keep_what_was_answered(drill, use, last):
    use(bank.card("first"), bank.card("second"))
    code, out, _ = drill("--seed 1", "", "", "good", "half an answer", *last)
    assert code == 0 and [rating for _, rating in stored()] == [3]
    assert "Stopped. Everything you answered is stored." in out


def test_ctrl_c_stops_as_cleanly(use, monkeypatch, capsys):
    use(bank.card())

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert cli.main(["drill"]) == 0
    assert "Stopped" in capsys.readouterr().out and stored() == []


def test_a_skipped_question_is_not_stored(drill, use):
    use(bank.card("first"), bank.card("second"))
    _, out, _ = drill("--seed 1", "s", "", "", "easy")
    assert [rating for _, rating in stored()] == [4] and "1 answered" in out


def test_what_was_known_is_not_asked_again_the_same_day(drill, use):
    use(bank.number("known"), bank.number("new"))
    state.record("known", 4, 5)
    _, out, _ = drill("--seed 1", "q")
    assert "0 due, 1 new" in out


def test_a_case_is_ticked_and_scored(drill, use):
    use(bank.case())
    _, out, _ = drill("", "notes", "y", "y", "y", "n", "y")
    assert stored() == [("a-case", 3)] and "8 of 9 points" in out


def test_a_bug_is_numbered_and_a_repair_may_have_several_lines(drill, use, monkeypatch):
    use(bank.bug())
    seen = []
    monkeypatch.setattr(judge, "bug", lambda item, line, text: seen.append((line, text)) or Verdict("ok", "right", 1.0))
    _, out, _ = drill("", "3", "total += 1\\", "    return total")
    assert seen == [(3, "total += 1\n    return total")] and stored() == [("a-bug", 3)]
    assert " 1  def run():" in out


class Editor:
    """A learner who writes `sources` into the file, one each time before Enter is pressed."""

    def __init__(self, path, *sources):
        self.path, self.sources = path, list(sources)

    def __call__(self, prompt=""):
        if "Enter checks" in prompt:
            if not self.sources:
                return "?"
            self.path.write_text(self.sources.pop(0))
            return ""
        raise EOFError


def test_code_is_written_in_a_file_and_checked_in_a_process_of_its_own(use, monkeypatch, own_home, capsys):
    use(bank.code())
    path = own_home / "drills" / "a-code.py"
    right = "def positions_from_mask(m):\n    return (m.long().cumsum(1) - 1).clamp(min=0)\n"
    monkeypatch.setattr("builtins.input", Editor(path, right))
    assert cli.main(["drill", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "[ok]" in out and stored() == [("a-code", 3)] and path.read_text() == right


def test_code_written_earlier_is_kept_beside_the_fresh_file(use, monkeypatch, tmp_path, capsys):
    use(bank.code())
    work = tmp_path / "work"
    work.mkdir()
    (work / "a-code.py").write_text("my precious work")
    monkeypatch.setattr("builtins.input", Editor(work / "a-code.py"))
    assert cli.main(["drill", "--work", str(work)]) == 0
    kept = [path for path in work.iterdir() if ".mine-" in path.name]
    assert [path.read_text() for path in kept] == ["my precious work"] and kept[0].name in capsys.readouterr().out


def test_a_file_that_is_no_text_or_gone_is_a_sentence(use, monkeypatch, tmp_path, capsys):
    use(bank.code())
    path, steps = tmp_path / "a-code.py", []

    def learner(prompt=""):
        steps.append(prompt)
        if len(steps) == 1:
            path.write_bytes(b"\xff\xfe\x00")
        elif len(steps) == 2:
            path.unlink()
        else:
            return "?"
        return ""

    monkeypatch.setattr("builtins.input", learner)
    assert cli.main(["drill", "--work", str(tmp_path), "--mock", "5"]) == 0
    out = capsys.readouterr().out
    assert "is not UTF-8 text" in out and out.count("write your code in") == 2 and stored() == [("a-code", 1)]


def test_a_folder_that_cannot_be_written_is_one_sentence(drill, use, tmp_path):
    use(bank.code())
    (tmp_path / "file").write_text("")
    code, _, err = drill(f"--work {tmp_path}/file/deeper", "")
    assert code == 2 and "--work DIR" in err and err.count("\n") == 1 and stored() == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that nobody can write, not even root")
@pytest.mark.parametrize("options", ["--markdown /proc/a.md", "--anki /proc/a.apkg"])
def test_an_export_that_cannot_be_written_is_one_sentence(drill, use, options):
    use(bank.card())
    code, _, err = drill(f"export {options}")
    assert code == 2 and "cannot write '/proc/a." in err and err.count("\n") == 1


def test_without_an_editor_the_learner_is_told_to_open_the_file(monkeypatch, tmp_path):
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    out = io.StringIO()
    terminal.Terminal(out, tmp_path)._edit(tmp_path / "x.py")
    monkeypatch.setenv("EDITOR", "no-such-editor-here --flag")
    terminal.Terminal(out, tmp_path)._edit(tmp_path / "x.py")
    assert "no editor is set" in out.getvalue() and "cannot start 'no-such-editor-here --flag'" in out.getvalue()


def answers_of(items, minutes, seed):
    """The lines that a learner who knows every number types in a mock interview of this seed: (lines, planned)."""
    rng = random.Random(seed)
    planned, lines = session.interview(items, minutes, rng), []

    def answer(ask):
        if ask.form == "choice":
            said = ask.options[0] if ask.options[0] == "yes" else "good"
        elif ask.prompt.startswith("your number"):
            twin = random.Random()
            twin.setstate(state_before)
            said = f"{bank.numbers.draw(item, twin.randrange(2**31)).answer!r} {item.unit}"
        else:
            said = "" if ask.form == "reveal" else "?"
        assert len(lines) < 500, f"{item.id} does not take {said!r}"
        lines.append(said)
        return said

    for item in planned:
        state_before = rng.getstate()
        bank.lead(dialogue.converse(item, rng, tries=1), answer)
    return lines, planned


def test_a_mock_interview_of_the_real_bank_runs_to_the_end_from_a_pipe(own_home):
    seed, minutes = 16, 45
    lines, planned = answers_of(schema.load(), minutes, seed)
    done = subprocess.run(
        check=False, args=[sys.executable, "-m", "finetune_lab", "drill", "--mock", str(minutes), "--seed", str(seed), "--json"],
        input="".join(f"{line}\n" for line in lines), capture_output=True, text=True, timeout=120, encoding="utf-8",
        env={**os.environ, "FINETUNE_LAB_HOME": str(own_home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["answered"] == figures["planned"] == len(planned) and figures["not_reached"] == []
    assert {row["id"] for row in figures["answers"]} == {item.id for item in planned}
    known = {row["id"] for row in figures["answers"] if row["score"] == 1}
    assert known == {item.id for item in planned if item.kind in ("card", "number", "case")}
    assert figures["by_kind"]["number"]["score"] == 1 and figures["by_kind"]["code"]["score"] == 0
    assert "Score card:" in done.stderr and "reread lesson" in done.stderr
    assert [review.item for review in state.reviews()] == [item.id for item in planned]
    assert len({review.detail["mock"] for review in state.reviews()}) == 1


def test_a_mock_interview_stops_when_its_minutes_are_over(drill, use, monkeypatch):
    use(*[bank.number(f"n{i}", minutes=3) for i in range(5)])
    now = [0.0]
    monkeypatch.setattr(drill_cli.time, "monotonic", lambda: now[0])
    record = state.record

    def slow(*args, **kwargs):
        now[0] += 8 * 60
        return record(*args, **kwargs)

    monkeypatch.setattr(state, "record", slow)
    _, out, _ = drill("--mock 15 --seed 1", *["?"] * 5)
    assert len(stored()) == 2 and "Time is up: 3 not reached." in out and "not answered: n" in out


def test_practice_leaves_nothing_on_stdout_but_the_json_it_was_asked_for(drill, use):
    use(bank.number())
    code, out, err = drill("--json --seed 5", bank.right_number(bank.number(), 5))
    figures = json.loads(out)
    assert code == 0 and figures["score"] == 1 and figures["seed"] == 5 and "How many numbers" in err


def test_history_is_a_table_json_and_a_picture(drill, use, tmp_path):
    use(bank.number())
    assert "Nothing answered yet" in drill("--history")[1]
    assert drill(f"--history --plot {tmp_path}/h.png")[2].startswith("finetune-lab: there is no history to plot yet")
    state.record("a-number", 3, 60)
    code, out, _ = drill(f"--history --plot {tmp_path}/h.png")
    assert code == 0 and "100 %" in out and (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
    figures = json.loads(drill("--history --json")[1])
    assert figures["reviews"] == 1 and figures["topics"][0]["topic"] == "completion-labels"
    use(bank.number(), bank.card("other", topic="dpo", lesson="06"))
    assert json.loads(drill("--history --json --topic dpo")[1])["reviews"] == 0


def test_list_counts_the_bank(drill):
    figures = json.loads(drill("list --json")[1])
    items = schema.load()
    assert figures["items"] == len(items) == sum(figures["kind"].values()) == sum(figures["lesson"].values())
    numbers = json.loads(drill("list --json --kind number")[1])
    assert numbers["items"] == figures["kind"]["number"] == len(numbers["list"])
    assert json.loads(drill("--kind number list --json")[1]) == numbers, "a filter before the word counts as well"
    assert f"{len(items)} questions" in drill("list")[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--minutes 0", "expected minutes, 1 to 600"),
        ("--minutes soon", "'soon': expected minutes"),
        ("--mock nan", "expected minutes"),
        ("--mock 45 --minutes 20", "choose one of"),
        ("--mock 45 --history", "choose one of"),
        ("--plot a.png", "--plot needs --history"),
        ("--seed x", "invalid int value"),
        ("--level hard", "expected one of basic, advanced, expert"),
        ("--kind essay", "expected one of card"),
        ("--topic astrology", "fits no drill"),
        ("--lesson 77", "no drill belongs to it"),
        ("--minutes 1 --kind case", "too few"),
        ("export", "--anki FILE.apkg"),
        ("export --anki deck.zip", "ends in .apkg"),
        ("export --markdown no/such/folder/a.md", "there is no folder"),
        ("export --anki a.apkg --answers", "--answers belongs to --markdown"),
        ("--work pyproject.toml", "is not a folder"),
        ("dance", "dance"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_stores_nothing(drill, use, options, says, own_home, monkeypatch):
    from pathlib import Path

    use(*bank.one_of_each())
    monkeypatch.chdir(Path(__file__).parents[3])
    code, out, err = drill(options)
    assert code == 2 and out == "" and not own_home.exists()
    assert says in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_damaged_log_is_told_on_stderr_and_the_session_goes_on(drill, use, own_home):
    use(bank.number())
    own_home.mkdir()
    (own_home / "drills.sqlite").write_text("scribble " * 50)
    code, out, err = drill("--json --seed 5", bank.right_number(bank.number(), 5))
    assert code == 0 and json.loads(out)["answered"] == 1 and "was damaged; it was moved to" in err


def test_input_that_is_not_utf8_is_an_answer_like_any_other(own_home):
    done = subprocess.run(
        check=False, args=[sys.executable, "-m", "finetune_lab", "drill", "--kind", "number", "--seed", "1"],
        input=b"\xff\xfe\x00\n", capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0 and b"is not a number" in done.stdout and done.stderr == b""


def test_every_option_is_explained_with_an_example(capsys):
    for words in (["drill", "--help"], ["drill", "export", "--help"], ["drill", "list", "--help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 0 and "example" in capsys.readouterr().out


def test_the_seed_decides_questions_and_numbers(drill, use):
    use(*[bank.number(f"n{i}") for i in range(9)])
    first, again, other = (drill(f"--mock 9 --seed {seed}", *"???")[1] for seed in (1, 1, 2))
    assert first == again != other
    assert all(a != b for a, b in pairwise(re.findall(r"has a (\d+ by \d+)", first)))
