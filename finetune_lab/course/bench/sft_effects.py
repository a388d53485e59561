"""Bench `sft_effects`: what each argument of a fine-tuning run does to the tiny model, five seeds each.

Base setting: questions about towns ("answer"), 40 steps of 16 items, AdamW, transformers' linear schedule, 10 % of
warm-up, clipping at 1, no decay; full at lr 0.001, LoRA r=16 at 0.002. Every other setting changes one thing; a seed
changes items, order and adapters. Scores are on held-out questions. Then 32 items only, seen again and again at a
constant rate, looked at along the way: questions about what the base knows, tickets (JSON), and codes that nobody can
know. Then 16 x 1 against 4 x 4, and what fp16 does to real gradients. Rows are means over the seeds, each with its
standard deviation in a row of its own. No goals: whatever comes out is what the lesson says.
Finished runs wait in a file until the whole bench is done: a killed bench goes on where it was.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from finetune_lab.course import progress
from finetune_lab.course.bench.lora_effects import codes
from finetune_lab.course.bench.masking import answer_loss
from finetune_lab.lab import generate, micro_batches, tasks, train
from finetune_lab.lab.evaluate import LONGEST_ANSWER, general
from finetune_lab.lab.models import load
from finetune_lab.methods import loss_scaling, neftune, schedules

NAME = "sft_effects"
HELP = "learning rate, epochs, warm-up, schedule, batch, clipping, decay, NEFTune, fp16: what each does, five seeds"
UNITS = {"training loss": "nats", "held-out loss": "nats", "story perplexity": "perplexity"}


@dataclass(frozen=True)
class Setting:
    """One way to train for 640 items. `warmup`: share of the steps; `clip` inf: none; `noise`: NEFTune's alpha."""

    method: str = "full"
    lr: float = 1e-3
    batch: int = 16
    warmup: float = 0.1
    schedule: str = "linear"
    clip: float = 1.0
    decay: float = 0.0
    noise: float = 0.0

    @property
    def label(self) -> str:
        """The name of its rows, such as "full lr=0.001 warm-up 50 %"."""
        parts = [f"{self.method} lr={self.lr:g}"]
        if self.batch != 16:
            parts.append(f"batch {self.batch}")
        if self.warmup != 0.1:
            parts.append(f"warm-up {100 * self.warmup:g} %")
        if self.schedule != "linear":
            parts.append(self.schedule)
        if self.clip != 1:
            parts.append("no clipping" if math.isinf(self.clip) else f"clip {self.clip:g}")
        if self.decay:
            parts.append(f"decay {self.decay:g}")
        if self.noise:
            parts.append(f"NEFTune {self.noise:g}")
        return " ".join(parts)


FULL = Setting()
LORA = Setting("LoRA", lr=2e-3)
HIGH = replace(FULL, lr=4e-3)
RANK, ITEMS, SAMPLES = 16, 500, 640
SETTINGS = [
    *(replace(FULL, lr=lr) for lr in (6.25e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2)),
    *(replace(LORA, lr=lr) for lr in (5e-4, 2e-3, 8e-3, 3.2e-2)),
    *(replace(setting, noise=alpha) for setting in (LORA, FULL) for alpha in (5, 15)),
    *(replace(HIGH, warmup=warmup) for warmup in (0, 0.5)),
    *(replace(FULL, warmup=warmup) for warmup in (0, 0.5, 1)),
    *(replace(FULL, schedule=name) for name in ("constant", "cosine")),
    *(replace(HIGH, clip=clip) for clip in (math.inf, 0.1)),
    *(replace(FULL, decay=decay) for decay in (0.1, 10)),
    replace(LORA, decay=10),
    *(replace(FULL, batch=batch) for batch in (4, 64)),
]
EPOCHS = (1, 2, 5, 10, 20)
TASK = {"answers": "answer", "tickets": "extract", "codes": "answer"}  # kind of items -> task that scores them


@functools.cache
def items_of(kind: str, seed: int, count: int, test_items: int) -> tuple[list[dict], list[dict]]:
    """Training items and held-out ones. Nobody can know the code of a held-out question: only guess its form."""
    if kind == "codes":
        items = codes(count + test_items, seed)
        return items[:count], items[count:]
    return tasks.load_task(TASK[kind], "train", count, seed), tasks.load_task(TASK[kind], "test", test_items)


def measured(model, tokenizer, kind: str, items: list[dict]) -> dict[str, float]:
    """Loss of the reference answers and exact match."""
    most = LONGEST_ANSWER[TASK[kind]]
    said = generate.answer(model, tokenizer, [item["prompt"] for item in items], max_new_tokens=most)
    return {
        "held-out loss": answer_loss(model, tokenizer, items),
        "exact match": tasks.score(TASK[kind], said, items)["exact_match"],
    }


def student(method: str, seed: int):
    model, tokenizer = load("tiny", seed=seed)
    return (train.add_lora(model, RANK, seed=seed) if method == "LoRA" else model), tokenizer


def one_run(setting: Setting, seed: int, samples: int, test_items: int) -> dict[str, float]:
    """Train the tiny model once by `setting`; what it learnt and what it forgot."""
    model, tokenizer = student(setting.method, seed)
    items, tested = items_of("answers", seed, ITEMS, test_items)
    steps = samples // setting.batch
    noise = neftune.neftune(model.get_input_embeddings(), setting.noise) if setting.noise else contextlib.nullcontext()
    with noise:
        history = train.sft(
            model, tokenizer, items, steps=steps, batch_size=setting.batch, lr=setting.lr, seed=seed,
            warmup=round(setting.warmup * steps), schedule=getattr(schedules, setting.schedule), clip=setting.clip,
            weight_decay=setting.decay,
        )  # fmt: skip
    known = general(model, tokenizer, test_items // 2)
    last = math.ceil(steps / 8)
    return {
        "training loss": mean(row["loss"] for row in history[-last:]),
        **measured(model, tokenizer, "answers", tested),
        "sums kept": known["sums"],
        "story perplexity": known["story_perplexity"],
    }


def few_items(kind: str, seed: int, epochs: tuple[int, ...], test_items: int, count: int = 32) -> dict[str, float]:
    """Full fine-tuning on `count` items for the last of `epochs`; loss and score after each of them."""
    model, tokenizer = student("full", seed)
    items, tested = items_of(kind, seed, count, test_items)
    every, losses, result = count // 8, [], {}

    def look(step: int, loss: float) -> None:
        losses.append(loss)
        epoch, rest = divmod(step + 1, every)
        if rest == 0 and epoch in epochs:
            found = {"training loss": mean(losses[-every:])} | measured(model, tokenizer, kind, tested)
            result.update({f"{kind}, {count} items, epoch {epoch}: {what}": value for what, value in found.items()})

    train.sft(
        model, tokenizer, items, steps=every * epochs[-1], batch_size=8, lr=5e-4, seed=seed, warmup=4,
        schedule=schedules.constant, on_step=look,
    )  # fmt: skip
    return result


def each_seen_once(seed: int, samples: int, test_items: int) -> dict[str, float]:
    """As many tickets as samples: no item comes twice, so the training loss is one on unseen items, too."""
    model, tokenizer = student("full", seed)
    items, tested = items_of("tickets", seed, samples, test_items)
    history = train.sft(model, tokenizer, items, steps=samples // 16, batch_size=16, lr=5e-4, seed=seed)
    found = {"training loss": mean(row["loss"] for row in history[-5:])} | measured(model, tokenizer, "tickets", tested)
    return {f"tickets, each seen once: {what}": value for what, value in found.items()}


def jobs(quick: bool) -> dict[str, Callable[[int], dict[str, float]]]:
    """Name -> function of a seed that returns the measures of one run, each by its row's name."""
    samples, test_items = (32, 8) if quick else (SAMPLES, 100)
    epochs = EPOCHS[:3] if quick else EPOCHS
    settings = SETTINGS[1:3] if quick else SETTINGS

    def few_of(kind: str) -> Callable[[int], dict[str, float]]:
        return lambda seed: few_items(kind, seed, epochs[:-1] if kind == "tickets" else epochs, test_items // 2)

    def run_of(setting: Setting) -> Callable[[int], dict[str, float]]:
        return lambda seed: {
            f"{setting.label}: {what}": value for what, value in one_run(setting, seed, samples, test_items).items()
        }

    return {
        **{setting.label: run_of(setting) for setting in settings},
        **{f"few {kind}": few_of(kind) for kind in TASK},
        "once": lambda seed: each_seen_once(seed, 32 if quick else 480, test_items),
        "curves": lambda seed: micro_batches.curves_against_whole_batch(seed, 4 if quick else 30),
        "fp16": lambda seed: micro_batches.half_precision(seed, 4 if quick else 40),
    }


def kept_file() -> Path:
    """Where finished runs wait for the rest; another file as soon as the code that makes them changes."""
    modules = (train, micro_batches, schedules, neftune, loss_scaling, sys.modules[__name__])
    code = "".join(map(inspect.getsource, modules))
    return progress.home() / f"bench-{NAME}-{hashlib.sha256(code.encode()).hexdigest()[:12]}.json"


def run(quick: bool) -> list[dict]:
    """Rows: mean and standard deviation of every measure of every job. quick: few jobs, two seeds, no file."""
    keep = None if quick else kept_file()
    done = json.loads(keep.read_text()) if keep and keep.is_file() else {}
    rows = []
    for name, job in tqdm(jobs(quick).items(), desc="settings", leave=False):
        runs = []
        for seed in range(2 if quick else 5):
            key = f"{name}, seed {seed}"
            if key not in done:
                done[key] = job(seed)
                if keep:
                    keep.parent.mkdir(parents=True, exist_ok=True)
                    part = keep.with_suffix(".part")
                    part.write_text(json.dumps(done))
                    part.replace(keep)  # whole or not at all, wherever it is killed
            runs.append(done[key])
        for measure in runs[0]:
            values = [found[measure] for found in runs]
            unit = UNITS.get(measure.rpartition(": ")[2], "1")
            rows.append({"name": measure, "value": mean(values), "unit": unit})
            rows.append({"name": f"{measure}, standard deviation", "value": stdev(values), "unit": unit})
    if keep:
        keep.unlink()
    return rows
