"""Bench merge compares the same work; bench merge_smollm2 merges real runs by the command and scores both skills."""

import pytest

from finetune_lab.course import bench
from finetune_lab.course.bench import merge, merge_smollm2
from finetune_lab.lab import merging

SMALL = merge.QUICK | {"hidden": 128, "inner": 192, "layers": 2, "vocab": 2_000, "shard": 400_000, "rounds": 1}
# steps and rows of a run that only shows the way
SHORT = {"model": "tiny", "extract": {"steps": 2}, "math": {"steps": 2},
         "all": {"batch_size": 2, "items": 4, "test_items": 2, "lr": 1e-3}}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return merge.make_models(tmp_path_factory.mktemp("models"), SMALL)


@pytest.mark.parametrize("method", merge.METHODS)
def test_every_recipe_of_the_bench_fits_its_models_which_share_a_base(method, folders):
    plan = merging.plan(merge.recipe(method, *folders))
    assert plan.warnings == [] and plan.config.method == method
    assert len(plan.models) == (2 if method in ("linear", "slerp") else 3)


def test_the_copy_reads_every_input_and_writes_as_much_as_the_merge(folders, tmp_path):
    plan = merging.plan(merge.recipe("linear", *folders))
    merge.copy(plan, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size == plan.bytes_written == plan.bytes_read / 2


@pytest.fixture(scope="module")
def rows(folders, tmp_path_factory):
    place = tmp_path_factory.mktemp("out")
    found = merge.compare("linear", folders, place, SMALL) + merge.compare("ties", folders, place, SMALL)
    assert list(place.iterdir()) == []
    return found


def test_both_do_the_same_work_and_the_rows_have_names_of_their_own(rows):
    found = {row["name"]: row for row in rows}
    assert len(found) == len(rows) and all(set(row) == set(bench.COLUMNS) - {"holds"} for row in rows)
    for method, most in (("linear", 1e-6), ("ties", 0.02)):  # mergekit trims in bf16
        name = f"{method}: largest difference to mergekit over the value, tensors of the first shard"
        assert found[name]["value"] <= most


def test_a_call_is_charged_what_it_holds():
    _, peak = merge.measured(lambda: bytearray(b"x" * 30_000_000))
    assert peak is None or 29e6 < peak < 90e6


def test_a_merge_holds_a_few_tensors_however_many_there_are(tmp_path):
    base, a, b = merge.make_models(tmp_path, SMALL | {"hidden": 512, "inner": 2048, "layers": 8})
    config = merge.recipe("slerp", base, a, b)
    merging.merge(config, tmp_path / "warm", progress=False)
    _, peak = merge.measured(lambda: merging.merge(config, tmp_path / "out", progress=False))
    plan = merging.plan(config)
    assert plan.bytes_read > 120e6 and max(t.nbytes for t in plan.tensors) < 2.2e6
    assert peak is None or peak < 30e6


def test_runs_are_merged_every_way_and_scored_in_both_skills(tmp_path):
    found = merge_smollm2.measure(SHORT, tmp_path)
    names = {row["name"] for row in found}
    ways = ["specialist in extract", "specialist in math", "linear", "slerp", *merge_smollm2.DENSITY, "task_arithmetic"]
    assert {f"{skill}, {way}" for skill in ("extract", "math") for way in ["base", *ways]} <= names
    assert len(names) == len(found) and all(0 <= row["value"] for row in found)


def test_the_recorded_merges_keep_their_promises():
    kept = {row["name"]: row for row in bench.recorded("merge")["rows"]}
    for method in merge.METHODS:
        assert kept[f"{method}: peak memory over largest tensor x models x 3"]["holds"]
        assert kept[f"{method}: times faster than mergekit"]["ratio"] > 1.5
    assert kept["linear: largest difference to mergekit over the value, tensors of the first shard"]["holds"]


def test_the_recorded_specialists_of_smollm2_score_as_their_own_runs_say():
    kept = {row["name"]: row for row in bench.recorded("merge_smollm2")["rows"]}
    for skill in merge_smollm2.SKILLS:
        alone = kept[f"{skill}, specialist in {skill}"]
        assert abs(alone["value"] - alone["peer_value"]) <= 0.06  # three rows of fifty: the run scored in bf16
        assert kept[f"{skill}, base"]["value"] < 0.1 < alone["value"]
