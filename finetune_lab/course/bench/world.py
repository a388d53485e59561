"""Bench `world`: what the tiny base model knows, what fine-tuning teaches it in a minute, and what it forgets.

Greedy decoding on 200 held-out items a task; fine-tunes over five seeds (data, order, LoRA initialisation), one thread.
Seconds are CPU time of the training loop. "sd" is the sample standard deviation over the seeds.
"""

import statistics
import time

from tqdm import tqdm

from finetune_lab.lab import models, tasks, tiers, train
from finetune_lab.lab.evaluate import evaluate, general
from finetune_lab.lab.meter import one_thread

NAME = "world"
HELP = "the tiny model: what the base knows, what fine-tuning teaches it, what it forgets"
METERS = {"facts": "share", "sums": "share", "story_perplexity": "perplexity"}
EXTRACT_GOAL, TASK_GOAL, SECONDS_GOAL, BASE_GOAL = ">= 0.95", ">= 0.9", "<= 60", ">= 0.9"


def row(name: str, value: float, unit: str, goal: str | None = None, **more) -> dict:
    return {"name": name, "value": value, "unit": unit, "goal": goal} | more


def fine_tune(task: str, full: bool, seed: int, steps: int | None = None):
    """A fine-tuned copy of the tiny model, its tokenizer and the CPU seconds of training."""
    model, tokenizer = models.load("tiny")
    recipe = tiers.TINY.recipes[task]
    if not full:
        model = train.add_lora(model, recipe.rank, seed=seed)
    items = tasks.load_task(task, "train", recipe.items, seed)
    began = time.process_time()
    lr = recipe.full_lr if full else recipe.lora_lr
    train.sft(model, tokenizer, items, steps=steps or recipe.steps, batch_size=recipe.batch_size, lr=lr, seed=seed)
    return model, tokenizer, time.process_time() - began


def leaks(task: str, seeds: int) -> int:
    """Test combinations that stand in the training items of any seed."""
    tested = {item["key"] for item in tasks.load_task(task, "test", 200)}
    items = tiers.TINY.recipes[task].items
    return sum(item["key"] in tested for seed in range(seeds) for item in tasks.load_task(task, "train", items, seed))


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


@one_thread()
def run(quick: bool) -> list[dict]:
    """All rows; `quick`: 40 items, one seed, a quarter of the steps, and no goals for what was trained less."""
    n, seeds = (40, 1) if quick else (200, 5)
    return _base(n) + _fine_tunes(n, seeds, quick)


def _base(n: int) -> list[dict]:
    model, tokenizer = models.load("tiny")
    known = general(model, tokenizer, n)
    rows = [row(f"base: {k}", known[k], u, None if k == "story_perplexity" else BASE_GOAL) for k, u in METERS.items()]
    zero = evaluate(model, tokenizer, "extract", n)["exact_match"]
    rows.append(row("base: extract exact_match", zero, "share", "<= 0"))
    for task in ("answer", "math"):
        rows.append(row(f"base: {task} exact_match", evaluate(model, tokenizer, task, n)["exact_match"], "share"))
    return rows


def _fine_tunes(n: int, seeds: int, quick: bool) -> list[dict]:
    rows = []
    jobs = [("extract", False), ("extract", True), ("answer", False), ("math", False)]
    bar = tqdm(total=len(jobs) * seeds, desc="fine-tunes", leave=False)
    for task, full in jobs:
        label = f"{task} {'full' if full else 'LoRA r=16'}"
        scores, seconds, after = [], [], {k: [] for k in METERS}
        for seed in range(seeds):
            steps = tiers.TINY.recipes[task].steps // 4 if quick else None
            model, tokenizer, spent = fine_tune(task, full, seed, steps)
            scores.append(evaluate(model, tokenizer, task, n))
            seconds.append(spent)
            for k, v in general(model, tokenizer, n).items():
                after[k].append(v)
            bar.update()
        goal = None if quick or full else EXTRACT_GOAL if task == "extract" else TASK_GOAL
        for metric in scores[0]:
            values = [s[metric] for s in scores]
            aim = goal if metric == "exact_match" else None
            rows.append(row(f"{label}: {metric} mean", statistics.mean(values), "share", aim))
            rows.append(row(f"{label}: {metric} sd", spread(values), "share"))
        rows.append(row(f"{label}: training", statistics.mean(seconds), "CPU seconds", None if full else SECONDS_GOAL))
        for k, unit in METERS.items():
            rows.append(row(f"{label}: {k} afterwards mean", statistics.mean(after[k]), unit))
            rows.append(row(f"{label}: {k} afterwards sd", spread(after[k]), unit))
        rows.append(row(f"{label}: test combinations in training", leaks(task, seeds), "items", "<= 0"))
    bar.close()
    return rows
