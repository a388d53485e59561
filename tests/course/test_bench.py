"""`finetune-lab bench`: one shape for every measured claim, and `holds` computed, never typed."""

import json
import pkgutil

import pytest

from finetune_lab import cli
from finetune_lab.course import bench

BASE = {"name": "x", "value": 3.0, "unit": "s", "peer": None, "peer_value": None, "ratio": None}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"goal": "<= 3"}, True),
        ({"goal": ">= 3.5"}, False),
        ({"goal": "<= 1e-05", "value": 2e-5}, False),
        ({"goal": ">= 4", "ratio": 5.0}, True),  # the ratio decides where there is one
        ({"goal": None}, None),
    ],
)
def test_holds_is_computed_from_the_goal(change, expected):
    assert bench.holds(BASE | change) is expected


def test_the_table_prints_zero_as_zero_and_a_missed_goal_as_no():
    lines = bench.table({"rows": [BASE | {"value": 0, "goal": ">= 1", "holds": False}]}).splitlines()
    assert lines[1].split() == ["x", "0", "s", ">=", "1", "NO"]


def test_a_goal_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="must read like"):
        bench.holds(BASE | {"goal": "about 3"})


def test_every_bench_is_listed_with_its_own_words():
    found = {module.name for module in pkgutil.iter_modules(bench.__path__)}
    assert set(bench.BENCHES) == found
    for name in found:
        module = __import__(f"{bench.__name__}.{name}", fromlist=["x"])
        assert (module.NAME, module.HELP) == (name, bench.BENCHES[name])


@pytest.mark.parametrize("name", sorted(bench.BENCHES))
def test_a_recorded_run_says_where_it_comes_from_and_its_verdicts_are_true(name):
    kept = bench.recorded(name)
    assert kept["bench"] == name and kept["quick"] is False
    assert kept["command"] == f"finetune-lab bench {name}"
    assert set(kept["versions"]) >= {"torch", "transformers", "trl", "peft"} and kept["machine"]["cpu"]
    for row in kept["rows"]:
        assert set(row) == set(bench.COLUMNS)
        assert row["holds"] is bench.holds(row)


def test_the_world_meets_every_goal_in_its_recorded_run():
    missed = [row["name"] for row in bench.recorded("world")["rows"] if row["holds"] is False]
    assert not missed


def test_the_command_prints_the_recorded_run_as_json(capsys):
    assert cli.main(["bench", "world", "--recorded", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == bench.recorded("world")


@pytest.mark.parametrize(
    ("words", "says"),
    [(["bench", "speed"], "unknown bench 'speed'"), (["bench", "world", "--quick", "--record"], "--record keeps full")],
)
def test_a_wrong_request_gets_one_sentence(words, says, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_table_ends_with_what_was_missed():
    rows = [{"name": name, "holds": holds} for name, holds in {"a": True, "b": False, "c": None}.items()]
    assert bench.summary(rows) == ["\n1 of 2 goals hold; missed:", "b"]
    assert bench.summary(rows[2:]) == []


def test_a_row_that_is_not_recorded_is_named():
    with pytest.raises(ValueError, match="has no row 'nothing'"):
        bench.figure("world", "nothing")
