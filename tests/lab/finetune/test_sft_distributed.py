"""The same command under torchrun: two processes with half the batch learn what one process learns, and a run of two
that was killed ends with the weights of one that was not."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from finetune_lab.lab.finetune import run, runs

STEPS = 5
SETTINGS = {"items": 32, "steps": STEPS, "save_every": 2, "test_items": 2}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def torchrun(out):
    """The command line, and its environment: an FSDP configuration, and no GPU."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "-m", "finetune_lab", "sft", "--task", "extract", "--batch-size", "4", "--json", *flags, "--out", str(out),
    ]  # fmt: skip
    environment = {"ACCELERATE_USE_FSDP": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {"args": command, "env": {**os.environ, **environment}, "text": True}


def finished(out):
    """The report of a run that ends by itself."""
    done = subprocess.run(**torchrun(out), check=False, capture_output=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # one process speaks


def kill_when(happened, process):
    """SIGKILL for torchrun and its workers as soon as `happened()`."""
    while not happened():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for each in family:
        each.kill()
    process.wait()
    psutil.wait_procs(family[1:])


def weights(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    return out, finished(out)


def test_two_processes_have_the_loss_curve_of_one_with_the_same_global_batch(recipe, together):
    alone = run.sft(recipe(batch_size=8, **SETTINGS), say=lambda text: None)
    _, report = together
    mine, theirs = ([loss for _, loss in each["loss"]] for each in (alone, report))
    assert report["processes"] == 2
    assert len(theirs) == STEPS and theirs == pytest.approx(mine, rel=1e-4)


def test_an_fsdp_configuration_without_a_gpu_is_said_to_be_ddp(together):
    assert "FSDP without a GPU" in [finding["name"] for finding in together[1]["findings"]]


def test_a_run_of_two_processes_killed_and_started_again_ends_with_the_same_weights(together, tmp_path):
    out = tmp_path / "run"
    mark = out / "checkpoints" / "checkpoint-2" / runs.MARK
    with (tmp_path / "log.txt").open("w") as log:
        kill_when(mark.exists, subprocess.Popen(**torchrun(out), stdout=log, stderr=log))
    assert "finished" not in runs.read(out / "run.json")
    report = finished(out)
    assert weights(out) == weights(together[0])
    assert report["loss"] == together[1]["loss"]
