"""Bench `distributed`: what each of two processes keeps, and whether both together learn what one learns.

`lab.distributed` is launched with torchrun on the CPU (gloo), fp32, full fine-tuning of the tiny model on `extract`,
the same global batch as one process. Bytes are those kept between two steps by the process that keeps most of them.
No times: two processes on one machine say nothing about a network.
"""

import json
import os
import subprocess
import sys

from finetune_lab.lab import distributed

NAME = "distributed"
HELP = "DDP, ZeRO-1 and FSDP2 in two processes: bytes each keeps, and the loss curve against one process"

MODES = ("ddp", "zero1", "fsdp2")
PROCESSES = 2
# the most that a process may keep, as a share of what one process keeps alone; ZeRO-1 deals out whole parameters
SHARES = {
    "ddp": {"weights": "<= 1", "gradients": "<= 1", "moments": "<= 1"},
    "zero1": {"weights": "<= 1", "gradients": "<= 1", "moments": "<= 0.55"},
    "fsdp2": {"weights": "<= 0.5", "gradients": "<= 0.5", "moments": "<= 0.5"},
}


def launched(steps: int) -> list[dict]:
    """The results of `lab.distributed` for each mode: one launch of two processes runs them one after the other."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", "finetune_lab.lab.distributed",
        "--mode", *MODES, "--steps", str(steps), "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"torchrun ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def rows_of(alone: dict, together: list[dict]) -> list[dict]:
    """Rows of every mode: largest relative difference of the loss, and the bytes of weights, gradients, moments."""
    rows = []
    (whole,) = alone["bytes"]
    for result in together:
        mode = result["mode"]
        pairs = zip(result["loss"], alone["loss"], strict=True)
        rows.append({"name": f"{mode}: largest relative difference of the loss", "value": max(abs(a - b) / b for a, b in pairs),
                     "unit": "1", "peer": "one process", "peer_value": 0.0, "goal": "<= 2e-05"})  # fmt: skip
        for what, goal in SHARES[mode].items():
            most = max(held[what] for held in result["bytes"])
            rows.append({"name": f"{mode}: {what} that a process keeps", "value": most, "unit": "bytes",
                         "peer": "one process", "peer_value": whole[what], "ratio": most / whole[what],
                         "goal": goal})  # fmt: skip
    return rows


def run(quick: bool) -> list[dict]:
    """All rows after 30 steps; `quick` takes 3."""
    steps = 3 if quick else 30
    return rows_of(distributed.train("one", steps=steps), launched(steps))
