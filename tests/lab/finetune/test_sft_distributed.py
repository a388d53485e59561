"""The same command under torchrun: two processes with half the batch learn what one process learns."""

import json
import os
import subprocess
import sys

import pytest

from finetune_lab.lab.finetune import run

STEPS = 5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_have_the_loss_curve_of_one_with_the_same_global_batch(recipe, tmp_path):
    settings = {"items": 32, "steps": STEPS, "save_every": 2, "test_items": 2}
    alone = run.sft(recipe(batch_size=8, out=str(tmp_path / "one"), **settings), say=lambda text: None)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "-m", "finetune_lab", "sft", "--task", "extract", "--batch-size", "4", "--json", *flags,
        "--out", str(tmp_path / "two"),
    ]  # fmt: skip
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=580,
        env={**os.environ, "ACCELERATE_USE_FSDP": "true", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads(done.stdout)  # one process speaks
    assert together["processes"] == 2
    mine, theirs = ([loss for _, loss in report["loss"]] for report in (alone, together))
    assert len(theirs) == STEPS and theirs == pytest.approx(mine, rel=1e-4)
    # accelerate makes DDP of an FSDP configuration without a GPU: that is said
    assert "FSDP without a GPU" in [finding["name"] for finding in together["findings"]]
