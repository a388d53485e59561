"""Callbacks of a run: a bar, a function called at each step, and checkpoints that are marked when they are complete.

Work with every trainer that is a `transformers.Trainer` (SFT, DPO, KTO, reward).
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import TrainerCallback

from finetune_lab.errors import UserError
from finetune_lab.lab.finetune import runs

OnStep = Callable[[int, float], None]


class Bar(TrainerCallback):
    """One bar on stderr: step, loss, held-out loss, rate. It starts where a resumed run starts."""

    def __init__(self):
        self.bar, self.shown = None, {}

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", file=sys.stderr
            )

    def on_log(self, args, state, control, logs=None, **_):
        if self.bar is None or not logs:
            return
        for key, name in (("loss", "loss"), ("eval_loss", "held out"), ("learning_rate", "lr")):
            if key in logs:
                self.shown[name] = f"{logs[key]:.3g}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()


class Steps(TrainerCallback):
    """Calls `on_step(step, loss)` after each logged step: a live curve, a test that kills the process."""

    def __init__(self, on_step: OnStep):
        self.on_step = on_step

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs and state.is_world_process_zero:
            self.on_step(state.global_step, logs["loss"])


class Finite(TrainerCallback):
    """Stops a run whose loss is no number any more, before its weights are written over good ones."""

    def on_log(self, args, state, control, logs=None, **_):
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"the loss is {logs['loss']} at step {state.global_step}: the run has broken. Use a lower lr, or bf16 "
                "instead of fp16; then start with --fresh."
            )


class Complete(TrainerCallback):
    """Marks each checkpoint when every process has written its part, with the seconds of training so far."""

    def __init__(self, seconds_before: float = 0.0):
        self.seconds_before, self.began = seconds_before, time.perf_counter()

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def on_train_begin(self, args, state, control, **_):
        self.began = time.perf_counter()

    def on_save(self, args, state, control, **_):
        if dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            runs.mark_complete(folder, step=state.global_step, seconds=self.seconds())
