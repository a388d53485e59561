"""Claims about the folder of a run: only complete checkpoints count, nothing finished is written over."""

import os
import subprocess
import sys

import pytest

from finetune_lab.errors import UserError
from finetune_lab.lab.finetune import runs


@pytest.fixture
def checkpoint(tmp_path):
    def make(step, complete=True):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights" * step)
        (folder / "training_args.bin").write_bytes(b"a pickle")
        if complete:
            runs.mark_complete(folder, step=step)
        return folder

    return make


def test_the_newest_complete_checkpoint_is_taken_and_a_cut_off_one_deleted(checkpoint, tmp_path):
    checkpoint(2), checkpoint(10)
    cut = checkpoint(12, complete=False)
    assert runs.last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-10"
    assert not cut.exists()


@pytest.mark.parametrize("damage", ["shorter", "missing", "broken mark", "mark of another shape"])
def test_a_checkpoint_that_lost_something_does_not_count(checkpoint, tmp_path, damage):
    checkpoint(2)
    last = checkpoint(4)
    weights, mark = last / "adapter_model.safetensors", last / runs.MARK
    if damage == "shorter":
        weights.write_bytes(b"weigh")
    elif damage == "missing":
        weights.unlink()
    else:
        mark.write_text("{" if damage == "broken mark" else '{"files": 3}')
    assert runs.last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"


def test_the_pickle_that_nobody_reads_is_removed(checkpoint):
    assert not (checkpoint(2) / "training_args.bin").exists()


def test_no_checkpoint_is_none(tmp_path):
    assert runs.last_checkpoint(tmp_path / "checkpoints") is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    runs.write(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        runs.write(path, {"a": 2})
    assert runs.read(path) == {"a": 1}


def test_another_recipe_in_the_same_folder_is_named(tmp_path):
    runs.write(tmp_path / "run.json", {"identity": {"lr": 1e-4, "seed": 0}})
    with pytest.raises(
        UserError, match=r"holds another run: lr was 0.0001 and is now 0.01. Give another --out, or --fresh"
    ):
        runs.state_of(tmp_path, {"lr": 1e-2, "seed": 0})


def test_a_folder_with_other_files_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files but no run"):
        runs.state_of(tmp_path, {})


def test_states_of_a_run(tmp_path):
    folder = tmp_path / "run"
    assert runs.state_of(folder, {"lr": 1}) == "new"
    runs.write(folder / "run.json", {"identity": {"lr": 1}})
    assert runs.state_of(folder, {"lr": 1}) == "unfinished"
    runs.write(folder / "run.json", {"identity": {"lr": 1}, "finished": 1.0})
    assert runs.state_of(folder, {"lr": 1}) == "finished"


def test_an_older_run_is_put_aside_and_never_onto_another(tmp_path):
    folder = tmp_path / "run"
    for expected in ("run.1", "run.2"):
        runs.write(folder / "run.json", {"identity": {}})
        assert runs.put_aside(folder).name == expected
    assert runs.put_aside(folder) is None


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    code = (
        "import sys, filelock\n"
        "lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".run.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    with pytest.raises(UserError, match="another process is training"), runs.locked(tmp_path / "run"):
        pass
    other.kill()
    other.communicate()
    with runs.locked(tmp_path / "run"):  # the system let go of it
        pass
