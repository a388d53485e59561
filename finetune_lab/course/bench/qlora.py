"""Bench `qlora`: what 4 bits cost, on the tiny model, five seeds.

Four questions. The base with one planted outlier a layer, as real models have (`lab.outliers`), rounded to a format
and restored: what does it still know? (Without outliers: bench `nf4`.) QLoRA against LoRA in full precision: same
items, order, rank and steps, only the base differs. Ways to merge a QLoRA adapter, against the model before the merge.
The dtype of the matrix product. Each row is a mean over the seeds, with its standard deviation in a row of its own. No
goals: whatever comes out is what the lesson says. A run's seed draws items, order and A; for the base it draws the
items that it is asked.
"""

import copy
import functools
import time
from collections.abc import Callable
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from finetune_lab.course.bench.masking import answer_loss
from finetune_lab.lab import generate, tasks, train
from finetune_lab.lab.evaluate import LONGEST_ANSWER, general
from finetune_lab.lab.models import load
from finetune_lab.lab.outliers import plant_outliers
from finetune_lab.lab.tiers import TINY
from finetune_lab.methods.codebooks import fp4_code, int_code, nf4_code, round_trip
from finetune_lab.methods.inject import active_layers, find_targets, inject
from finetune_lab.methods.lora import LoRALinear
from finetune_lab.methods.nf4_linear import NF4Linear
from finetune_lab.methods.qlora import merge_dequantized, merge_in_4bit, quantize_linears, replace_adapters

NAME = "qlora"
HELP = "QLoRA against LoRA, ways to merge, compute dtypes, and what a rounded base still knows, five seeds"

# name -> task, training items, steps, learning rate, held-out items
SETTINGS = {"math": ("math", 4000, 60, 1e-3, 100), "extract": ("extract", 1600, 30, 2e-3, 50)}
CODES = {"NF4": nf4_code(), "FP4": fp4_code(), "INT4": int_code(4), "INT8": int_code(8)}
TENSOR = 10**9  # a block larger than any weight: one scale for the whole tensor
FORMATS = [
    ("NF4", 64), ("NF4", 4096), ("NF4", TENSOR), ("FP4", 64), ("INT4", 64), ("INT4", TENSOR), ("INT8", TENSOR),
]  # fmt: skip
OUTLIER = 20.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHORT = 1 / 6  # of the steps, for the dtypes: CPUs without fp16 units need six times as long there
MAIN = ("dequantised base", "original base", "in 4 bit", "original base, then NF4")  # ways to merge, on every setting
UNITS = {"held-out answer loss": "nats", "training loss": "nats", "CPU seconds": "s", "weight bytes": "B"}


def rounded(model: nn.Module, code: Tensor, blocksize: int) -> nn.Module:
    """A copy of `model` whose linear layers (not the head) hold what is left after rounding to `code`."""
    model = copy.deepcopy(model)
    for path in find_targets(model, "all-linear"):
        weight = model.get_submodule(path).weight
        weight.data = round_trip(weight, code, min(blocksize, weight.numel())).to(weight.dtype)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the frozen linear weights under the adapter take."""
    bases = [layer.base for layer in active_layers(model).values()]
    return sum(base.quantized.nbytes if isinstance(base, NF4Linear) else base.weight.nbytes for base in bases)


def known(model, tokenizer, seed: int, items: int) -> dict[str, float]:
    return {name.replace("_", " "): value for name, value in general(model, tokenizer, items, seed).items()}


def scores(model, tokenizer, task: str, items: int) -> dict[str, float]:
    test = tasks.load_task(task, "test", items)
    said = generate.answer(model, tokenizer, [i["prompt"] for i in test], max_new_tokens=LONGEST_ANSWER[task])
    return {
        "exact match": tasks.score(task, said, test)["exact_match"],
        "held-out answer loss": answer_loss(model, tokenizer, test),
    }


@functools.cache
def trained(setting: str, base: str, seed: int, share: float = 1.0):
    """(model, tokenizer, figures) after one run. base: "LoRA" in fp32, or "QLoRA", or the compute dtype of a QLoRA."""
    task, count, steps, lr, items = SETTINGS[setting]
    recipe, steps = TINY.recipes[task], round(share * steps)
    model, tokenizer = load("tiny", seed=seed)
    if base != "LoRA":
        quantize_linears(model, compute_dtype=DTYPES.get(base))
    torch.manual_seed(seed)
    inject(model, r=recipe.rank, alpha=2 * recipe.rank)
    data = tasks.load_task(task, "train", count, seed)
    began = time.process_time()
    history = train.sft(model, tokenizer, data, steps=steps, batch_size=recipe.batch_size, lr=lr, seed=seed)
    spent = time.process_time() - began
    figures = {
        **scores(model, tokenizer, task, items),
        "training loss": mean(row["loss"] for row in history[-10:]),
        "CPU seconds": spent,
        "weight bytes": weight_bytes(model),
    }
    return model, tokenizer, figures


def ways(base: nn.Module) -> dict[str, Callable[[str, LoRALinear], nn.Module]]:
    """How an adapter may become one weight; base: the model before it was quantised."""

    def onto_the_original(path: str, layer: LoRALinear) -> nn.Linear:
        merged = merge_dequantized(layer)
        merged.weight.data = base.get_submodule(path).weight.data + layer.delta().detach()
        return merged

    def then(first: Callable, code: Tensor) -> Callable:
        def way(path: str, layer: LoRALinear) -> nn.Linear:
            merged = first(path, layer)
            merged.weight.data = round_trip(merged.weight, code, 64)
            return merged

        return way

    def dequantized(path: str, layer: LoRALinear) -> nn.Linear:
        return merge_dequantized(layer)

    return {
        "dequantised base": dequantized,
        "original base": onto_the_original,
        "in 4 bit": lambda path, layer: merge_in_4bit(layer),
        "original base, then NF4": then(onto_the_original, CODES["NF4"]),
        "dequantised base, then FP4": then(dequantized, CODES["FP4"]),
        "dequantised base, then INT4": then(dequantized, CODES["INT4"]),
        "dequantised base, then INT8": then(dequantized, CODES["INT8"]),
    }


def relative_norms(model: nn.Module, base: nn.Module) -> dict[str, float]:
    """Norm of the update, and of the rounding error, relative to that of the weights."""
    update = error = weight = 0.0
    for path, layer in active_layers(model).items():
        w = base.get_submodule(path).weight.detach()
        update += layer.delta().detach().square().sum().item()
        error += (layer.base_weight - w).square().sum().item()
        weight += w.square().sum().item()
    return {"update relative to the weights": (update / weight) ** 0.5, "rounding error": (error / weight) ** 0.5}


def merged(setting: str, seed: int, share: float) -> dict[str, dict[str, float]]:
    """Scores of the QLoRA run of `setting` after each way to merge, and what the update weighs."""
    model, tokenizer, _ = trained(setting, "QLoRA", seed, share)
    base, (task, *_, items) = load("tiny")[0], SETTINGS[setting]
    out = {}
    for name, way in ways(base).items():
        if name in MAIN or setting == "math":
            out[name] = scores(replace_adapters(copy.deepcopy(model), way), tokenizer, task, items)
    return out | {"": relative_norms(model, base)}


def _rows(prefix: str, mine: list[dict], peer: str | None, other: list[dict] | None) -> list[dict]:
    """For each metric a row of means and one of standard deviations. mine, other: figures, one dict a seed."""
    rows = []
    for metric in mine[0]:
        for what, summary in (("", mean), (", standard deviation", stdev)):
            a = summary(run[metric] for run in mine)
            b = summary(run[metric] for run in other) if other and metric in other[0] else None
            rows.append({"name": f"{prefix}: {metric}{what}", "value": a, "unit": UNITS.get(metric, "1"),
                         "peer": peer, "peer_value": b, "ratio": None, "goal": None})  # fmt: skip
    return rows


def run(quick: bool) -> list[dict]:
    """Rows: mean and standard deviation over the seeds; quick: two seeds, two formats, one short setting."""
    seeds, asked, share = (range(2), 20, 0.5) if quick else (range(5), 50, 1.0)
    rows = []
    model, tokenizer = load("tiny")
    plain = [known(model, tokenizer, seed, asked) for seed in seeds]
    plant_outliers(model, OUTLIER)
    for name, blocksize in [("NF4", 64), ("INT4", TENSOR)] if quick else FORMATS:
        round_base = rounded(model, CODES[name], blocksize)
        figures = [known(round_base, tokenizer, seed, asked) for seed in seeds]
        where = "one scale a tensor" if blocksize == TENSOR else f"block {blocksize}"
        rows += _rows(f"base with outliers, {name}, {where}", figures, "fp32", plain)
    for setting in ["math"] if quick else SETTINGS:
        four, full = [], []
        for seed in seeds:  # in turn, so that the machine's noise hits both
            four.append(trained(setting, "QLoRA", seed, share)[2])
            full.append(trained(setting, "LoRA", seed, share)[2])
        rows += _rows(f"{setting}, QLoRA", four, "LoRA", full)
        after = [merged(setting, seed, share) for seed in seeds]
        for way in after[0]:
            prefix = f"{setting}, merged {way}" if way else f"{setting}, adapter"
            rows += _rows(prefix, [each[way] for each in after], "unmerged" if way else None, four if way else None)
    for dtype in ["bf16"] if quick else DTYPES:
        figures = [trained("math", dtype, seed, SHORT)[2] for seed in seeds]
        peers = [trained("math", "QLoRA", seed, SHORT)[2] for seed in seeds]
        rows += _rows(f"math, compute in {dtype}", figures, "fp32", peers)
    return rows
