"""Two processes learn what one learns from the same global batch, in three ways that keep different bytes."""

import json
import os
import subprocess
import sys

import pytest

from finetune_lab.errors import UserError
from finetune_lab.lab import distributed, models, tasks, train
from finetune_lab.methods.memory.architecture import from_config
from finetune_lab.methods.memory.estimate import estimate
from finetune_lab.methods.memory.recipe import Recipe

STEPS = 12
WHOLE = 10_232_064  # bytes of the tiny model in fp32


@pytest.fixture(scope="module")
def alone():
    return distributed.train("one", steps=STEPS)


@pytest.fixture(scope="module")
def together():
    """Mode -> its result: one launch of two processes trains the three modes, one after the other."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", "finetune_lab.lab.distributed",
        "--mode", "ddp", "zero1", "fsdp2", "--steps", str(STEPS), "--json",
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {result["mode"]: result for result in json.loads(done.stdout)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero1", "fsdp2"])
def test_two_processes_have_the_loss_curve_of_one_with_the_same_global_batch(alone, together, mode):
    assert together[mode]["processes"] == 2 and len(alone["loss"]) == STEPS
    assert together[mode]["loss"] == pytest.approx(alone["loss"], rel=2e-5)  # sums in another order, fp32


@pytest.mark.slow
def test_ddp_keeps_everything_in_every_process(alone, together):
    assert together["ddp"]["bytes"] == alone["bytes"] * 2
    assert alone["bytes"] == [{"weights": WHOLE, "gradients": WHOLE, "moments": 2 * WHOLE}]


@pytest.mark.slow
def test_zero1_divides_the_moments_between_the_processes_and_nothing_else(together):
    held = together["zero1"]["bytes"]
    assert all(one["weights"] == one["gradients"] == WHOLE for one in held)
    assert sum(one["moments"] for one in held) == 2 * WHOLE
    assert max(one["moments"] for one in held) < 1.1 * WHOLE  # whole parameters are dealt out: nearly halves


@pytest.mark.slow
def test_fsdp2_divides_weights_gradients_and_moments(together):
    assert together["fsdp2"]["bytes"] == [{"weights": WHOLE // 2, "gradients": WHOLE // 2, "moments": WHOLE}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("mode, sharding", [("ddp", "ddp"), ("zero1", "zero1"), ("fsdp2", "fsdp")])
def test_the_memory_estimator_names_the_bytes_that_a_process_keeps(together, mode, sharding):
    config = json.loads((models.tiny_folder() / "config.json").read_text())
    recipe = Recipe(method="full", dtype="fp32", ranks=2, sharding=sharding)
    ledger = estimate(from_config(config), recipe, device="cpu")
    buckets = sum(line.bytes for line in ledger.lines if line.name == "DDP buckets")  # our loop has them as views
    held = max(together[mode]["bytes"], key=lambda one: one["moments"])
    assert ledger.total("weights") == held["weights"]
    assert ledger.total("optimizer") == pytest.approx(held["moments"], rel=1e-4)  # it counts AdamW's step numbers too
    assert ledger.total("gradients") - buckets == held["gradients"]


def test_one_process_has_the_curve_of_the_loop_of_the_lessons(alone):
    model, tokenizer = models.load("tiny", seed=0)
    items = tasks.load_task("extract", "train", 64)
    rows = train.sft(model, tokenizer, items, steps=STEPS, batch_size=8, lr=1e-3)
    assert alone["loss"] == pytest.approx([row["loss"] for row in rows], rel=1e-5)


@pytest.mark.parametrize("mode, said", [("ddp", "torchrun"), ("fsdp", "unknown mode 'fsdp'")])
def test_a_mode_that_does_not_fit_is_named(mode, said):
    with pytest.raises(UserError, match=said):
        distributed.train(mode)


def test_the_module_says_it_in_one_sentence_and_exits_with_two(capsys):
    assert distributed.main(["--mode", "fsdp2"]) == 2
    assert "mode 'fsdp2' with 1 process(es)" in capsys.readouterr().err
