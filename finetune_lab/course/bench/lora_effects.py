"""Bench `lora_effects`: what rank, alpha, rate, targets and method do to the tiny model, five seeds each.

Two targets. "answers": questions about towns that the base knows, 40 steps, scored on held-out questions: a new manner
for old knowledge. "codes": 48 invented codes that nobody can know, 100 steps, scored on the same 48: new facts, which
need room. Every setting of a target sees the same items in the same order; seeds change items, order and A.
A setting's rows are means over the seeds, each with its standard deviation in a row of its own. No goals: whatever
comes out is what the lesson says.
"""

import functools
import random
from dataclasses import dataclass, replace
from statistics import correlation, mean, stdev

import torch
from tqdm import tqdm

from finetune_lab.course.bench.masking import answer_loss
from finetune_lab.lab import generate, tasks, train, world
from finetune_lab.lab.evaluate import general
from finetune_lab.lab.models import load
from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.inject import active_layers, find_targets, inject
from finetune_lab.methods.lora import LoRALinear
from finetune_lab.methods.spectrum import energy, energy_rank, intruder_dimensions, magnitude_and_direction_change
from finetune_lab.methods.trainable import loraplus_groups

NAME = "lora_effects"
HELP = "rank, alpha, rate, targets, LoRA+, DoRA, full fine-tuning: learning, forgetting, spectra, five seeds"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
LAYERS = {"LoRA": LoRALinear, "LoRA+": LoRALinear, "DoRA": DoRALinear}
STEPS = {"answers": 40, "codes": 100}
UNITS = {"loss": "nats", "story perplexity": "perplexity"}


@dataclass(frozen=True)
class Setting:
    """One way to train. `alpha` None means 2 * rank; `ratio` is LoRA+'s, B's rate over A's."""

    target: str
    method: str = "LoRA"
    lr: float = 2e-3
    rank: int = 16
    alpha: float | None = None
    where: str = "all linear"
    ratio: float = 1

    @property
    def label(self) -> str:
        """The name of its rows, such as "answers, LoRA r=16 lr=0.002"."""
        parts = [f"{self.target}, {self.method}"]
        if self.method != "full":
            parts.append(f"r={self.rank}")
        if self.alpha is not None:
            parts.append(f"alpha={self.alpha:g}")
        if self.where != "all linear":
            parts.append(self.where)
        if self.ratio != 1:
            parts.append(f"ratio={self.ratio:g}")
        return " ".join([*parts, f"lr={self.lr:g}"])


BASE = Setting("answers")
FULL = replace(BASE, method="full", lr=1e-3)
NEW = replace(BASE, target="codes")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
RANKS = (1, 4, 16, 64)
SETTINGS = [
    *(replace(BASE, rank=rank, lr=lr) for rank in RANKS for lr in RATES),
    *(replace(FULL, lr=lr) for lr in (2.5e-4, 5e-4, 1e-3, 2e-3)),
    *(replace(BASE, alpha=alpha, lr=1e-3) for alpha in (8, 128)),
    *(replace(BASE, method="LoRA+", ratio=4, lr=lr) for lr in (5e-4, 1e-3)),
    *(replace(BASE, method="LoRA+", ratio=16, lr=lr) for lr in (2.5e-4, 5e-4)),
    *(replace(NEW, rank=rank) for rank in RANKS),
    replace(NEW, rank=1, lr=8e-3),
    replace(NEW, method="full", lr=5e-4),
    *(replace(at, rank=38, where="attention") for at in (BASE, NEW)),  # as many numbers as r=16 everywhere
    *(replace(at, rank=28, where="feed-forward") for at in (BASE, NEW)),  # 1.3 % more
    *(replace(at, method="DoRA") for at in (BASE, NEW)),
]  # fmt: skip
LOOKED_INTO = {
    *(replace(FULL, lr=lr) for lr in (2.5e-4, 5e-4, 1e-3, 2e-3)),
    *(replace(BASE, lr=lr) for lr in RATES),
    replace(BASE, rank=1, lr=8e-3),
    *(replace(BASE, rank=64, lr=lr) for lr in RATES[:2]),
    replace(BASE, method="DoRA"),
}


def codes(n: int, seed: int) -> list[dict]:
    """`n` questions for invented four-digit codes; nothing but memory can answer them."""
    rng = random.Random(seed)
    pairs = rng.sample([(person, product) for person in world.PEOPLE for product in world.PRODUCTS], n)
    ask, say = "What is the code of {} for the {}?", "It is {}."
    return [
        {
            "prompt": [{"role": "user", "content": ask.format(person, product)}],
            "completion": [{"role": "assistant", "content": say.format(rng.randrange(1000, 10000))}],
        }
        for person, product in pairs
    ]


def adapted(model, setting: Setting, seed: int):
    """`model` ready to train by `setting`, in place, and AdamW's groups (None: all parameters at one rate)."""
    if setting.method == "full":
        return model, None
    where = {"all linear": "all-linear", "attention": ATTENTION, "feed-forward": FEED_FORWARD}[setting.where]
    torch.manual_seed(seed)
    alpha = 2 * setting.rank if setting.alpha is None else setting.alpha
    inject(model, where, r=setting.rank, alpha=alpha, layer=LAYERS[setting.method])
    return model, loraplus_groups(model, setting.lr, setting.ratio) if setting.method == "LoRA+" else None


def matrices(model) -> dict[str, torch.Tensor]:
    """Path -> weight (out, in) that each linear layer but the head acts with now, adapters included."""
    layers = active_layers(model) or {path: model.get_submodule(path) for path in find_targets(model, "all-linear")}
    return {path: layer.weight.detach().clone() for path, layer in layers.items()}


@functools.cache
def one_run(setting: Setting, seed: int, steps: int, test_items: int) -> dict[str, float]:
    """Train the tiny model once; what it learnt, what it forgot, and (for some settings) what happened to its matrices."""
    model, tokenizer = load("tiny", seed=seed)
    model, groups = adapted(model, setting, seed)
    if setting.target == "codes":
        items = tested = codes(48, seed)
    else:
        items, tested = tasks.load_task("answer", "train", 500, seed), tasks.load_task("answer", "test", test_items)
    spectra = setting in LOOKED_INTO
    before = matrices(load("tiny")[0]) if spectra else {}
    points: dict[str, list] = {}

    def look(step: int, _: float) -> None:
        if spectra and (step + 1) % (steps // 4) == 0:
            for path, weight in matrices(model).items():
                point = magnitude_and_direction_change(before[path], weight)
                points.setdefault(path.rpartition(".")[2], []).append(point)

    train.sft(
        model, tokenizer, items, steps=steps, batch_size=16, lr=setting.lr, seed=seed, groups=groups, on_step=look
    )
    said = generate.answer(model, tokenizer, [item["prompt"] for item in tested], max_new_tokens=16)
    known = general(model, tokenizer, test_items)
    result = {
        "loss": answer_loss(model, tokenizer, tested),
        "exact match": tasks.score("answer", said, tested)["exact_match"],
        "sums kept": known["sums"],
        "story perplexity": known["story_perplexity"],
    }
    if spectra:
        after = matrices(model)
        updates = {path: after[path] - before[path] for path in before}
        result |= {
            "energy in the first 4": mean(energy(update)[3].item() for update in updates.values()),
            "rank for 90 % of the energy": mean(energy_rank(update) for update in updates.values()),
            "relative size": mean((updates[path].norm() / before[path].norm()).item() for path in before),
            "intruders": sum(intruder_dimensions(before[path], after[path]) for path in before),
            "dM-dD correlation": mean(correlation(*zip(*pairs, strict=True)) for pairs in points.values()),
        }
    return result


def run(quick: bool) -> list[dict]:
    """Rows: mean and standard deviation of every measure of every setting. quick: two settings, two seeds, ten steps."""
    settings, seeds = ([BASE, replace(BASE, method="full", lr=5e-4)], range(2)) if quick else (SETTINGS, range(5))
    rows = []
    for setting in tqdm(settings, desc="settings", leave=False):
        steps = 10 if quick else STEPS[setting.target]
        runs = [one_run(setting, seed, steps, 20 if quick else 100) for seed in seeds]
        for measure in runs[0]:
            for what, summary in (("", mean), (", standard deviation", stdev)):
                value = summary(run[measure] for run in runs)
                rows.append(
                    {"name": f"{setting.label}: {measure}{what}", "value": value, "unit": UNITS.get(measure, "1")}
                )
    return rows
