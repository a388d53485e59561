"""Specialists of the tiny model for bench `merge_effects`: trained, kept while the process runs, and scored.

One base, three skills, a few dozen steps each, fully or with LoRA; and the joint training that is their ceiling. The
same arguments give the same weights. Leaves out: merging them (`merge_ways`, `methods.merging`).
"""

import functools
import random
from collections.abc import Iterable
from statistics import mean

import torch

from finetune_lab.course.merge_ways import Adapters, Weights
from finetune_lab.lab import forced, tasks, train
from finetune_lab.lab.evaluate import general, perplexity
from finetune_lab.lab.models import load
from finetune_lab.lab.tiers import TINY
from finetune_lab.methods import merging
from finetune_lab.methods.inject import active_layers, inject, merge_and_unload

SKILLS = ("extract", "answer", "math")
STEPS = {"extract": 30, "answer": 40, "math": 60}
JOINT_LR = 5e-4


@functools.cache
def base() -> tuple:
    """(model, tokenizer, weights) of the tiny model; the model is the vessel that every merge is poured into."""
    model, tokenizer = load("tiny")
    return model, tokenizer, forced.weights_of(model)


def train_one(kind: str, items: list[dict], steps: int, lr: float, seed: int) -> tuple[Weights, Adapters]:
    """One fine-tune of the tiny model: its whole weights, and its adapters where it is a LoRA."""
    model, tokenizer = load("tiny", seed=seed)
    torch.manual_seed(seed)
    if kind == "LoRA":
        inject(model, r=16, alpha=32)
    train.sft(model, tokenizer, items, steps=steps, batch_size=16, lr=lr, seed=seed)
    layers = active_layers(model).items()
    adapters = {path: merging.Adapter(x.A.detach().clone(), x.B.detach().clone(), x.scaling) for path, x in layers}
    return forced.weights_of(merge_and_unload(model) if adapters else model), adapters


@functools.cache
def specialist(kind: str, skill: str, seed: int, share: float = 1.0) -> tuple[Weights, Adapters]:
    """The fine-tune of one skill; share: of the steps."""
    recipe = TINY.recipes[skill]
    items = tasks.load_task(skill, "train", recipe.items, seed)
    lr = recipe.full_lr if kind == "full" else recipe.lora_lr
    return train_one(kind, items, round(share * STEPS[skill]), lr, seed)


@functools.cache
def joint(seed: int, share: float = 1.0) -> Weights:
    """One full training on what the three specialists saw, mixed: as many items of each skill, as many steps in all."""
    items = []
    for skill, steps in STEPS.items():
        rows = tasks.load_task(skill, "train", TINY.recipes[skill].items, seed)
        items += [rows[i] for batch in train.batches(len(rows), 16, round(share * steps), seed) for i in batch]
    random.Random(seed).shuffle(items)
    return train_one("full", items, len(items) // 16, JOINT_LR, seed)[0]


@functools.cache
def _items(skill: str, split: str, n: int, seed: int) -> list[dict]:
    return tasks.load_task(skill, split, n, seed)


def score(weights: Weights, seed: int, n: int, split: str = "test", skills: Iterable[str] = SKILLS) -> dict[str, float]:
    """Exact match a skill, and "loss", the mean over the skills, of the tiny model with these weights."""
    model, tokenizer, _ = base()
    forced.put_weights(model, weights)
    found = {skill: forced.scores(model, tokenizer, _items(skill, split, n, seed)) for skill in skills}
    return {s: f["exact_match"] for s, f in found.items()} | {"loss": mean(f["loss"] for f in found.values())}


def known(weights: Weights, seed: int, n: int) -> dict[str, float]:
    """What is left of the base: facts, sums, story perplexity."""
    model, tokenizer, _ = base()
    return {k.replace("_", " "): v for k, v in general(forced.put_weights(model, weights), tokenizer, n, seed).items()}


def stories(weights: Weights, seed: int, n: int) -> float:
    model, tokenizer, _ = base()
    texts = [item["text"] for item in _items("general", "test", 4 * n, seed) if item["kind"] == "story"][:n]
    return perplexity(forced.put_weights(model, weights), tokenizer, texts)
