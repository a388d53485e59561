"""Bench `levers`: what each lever of a training step saves in bytes, and what it costs in work and time, on the CPU.

A step is forward, loss and backward. Random weights, ten layers of SmolLM2-135M's shape (bytes and work do not ask what
a model knows). Bytes: what autograd keeps for backward. FLOPs: `torch.utils.flop_counter`. Time: interleaved CPU time.
`torch.compile` is measured on two layers, because it needs a minute to compile even these; full runs only.
"""

import os
from collections.abc import Callable

import torch
import torch._inductor.config
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.lab.meter import interleaved_seconds, median_ratio, one_thread, peak_bytes
from finetune_lab.methods.memory.tensors import saved_bytes

NAME = "levers"
HELP = "checkpointing, LoRA, DoRA and compile: bytes saved for work and time, on ten layers of SmolLM2-135M's shape"

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
         "vocab_size": 49_152, "tie_word_embeddings": True}  # fmt: skip
FULL = {"layers": 10, "batch": 1, "seq": 256, "rounds": 5, "compile": True}
QUICK = {"layers": 2, "batch": 1, "seq": 64, "rounds": 3, "compile": False}
# goals for one layer's saved bytes, the step's FLOPs and its CPU time, as a ratio to full fine-tuning without a lever
GOALS = {
    "checkpointing": ("<= 0.1", "<= 1.34", "<= 1.45"),
    "LoRA q,v r=8": (">= 0.6", ">= 0.6", None),
    "LoRA all-linear r=16": (">= 0.8", ">= 0.6", None),
    "DoRA all-linear r=16": (">= 1.8", ">= 0.6", None),
}


def build(layers: int, dtype: torch.dtype, lever: str = "") -> torch.nn.Module:
    """A Llama of SHAPE in training mode with one lever applied."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).to(dtype)
    if lever == "checkpointing":
        model.activation_checkpointing_enable()
    elif lever:
        few = "q,v" in lever
        settings = {"r": 8 if few else 16, "target_modules": ["q_proj", "v_proj"] if few else "all-linear"}
        model = get_peft_model(model, LoraConfig(use_dora="DoRA" in lever, **settings))
    return model.train()


def step_of(model: torch.nn.Module, size: dict) -> Callable[[], None]:
    ids = torch.arange(size["batch"] * size["seq"]).reshape(size["batch"], size["seq"])

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def layer_bytes(lever: str, dtype: torch.dtype, size: dict) -> int:
    """Bytes that one layer keeps for backward: the difference of three layers and two, so that no logits are in it."""
    shape = (size["batch"], size["seq"])
    ids = torch.arange(shape[0] * shape[1]).reshape(shape)

    def kept(layers: int) -> int:
        model = build(layers, dtype, lever)
        return saved_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, model.parameters())

    return kept(3) - kept(2)


def flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compare(lever: str, size: dict, goals: tuple) -> list[dict]:
    """Rows of one lever against full fine-tuning in fp32: saved bytes, FLOPs, CPU time."""
    models = {name: build(size["layers"], torch.float32, name) for name in ("", lever)}
    steps = {name: step_of(model, size) for name, model in models.items()}
    seconds = interleaved_seconds(steps, size["rounds"])
    figures = {
        "bytes one layer keeps": ("bytes", {name: layer_bytes(name, torch.float32, size) for name in models}, None),
        "FLOPs": ("FLOPs", {name: flops(step) for name, step in steps.items()}, None),
        "CPU time": ("s", {name: min(times) for name, times in seconds.items()}, median_ratio(seconds, lever, "")),
    }
    return [
        {"name": f"{lever}: {what}", "value": values[lever], "unit": unit, "peer": "full fine-tuning",
         "peer_value": values[""], "ratio": ratio or values[lever] / values[""], "goal": goal}
        for (what, (unit, values, ratio)), goal in zip(figures.items(), goals, strict=True)
    ]  # fmt: skip


def in_bf16(size: dict) -> list[dict]:
    """Rows of adapters on a bf16 base (peft keeps them in fp32) against full fine-tuning in bf16: bytes of a layer."""
    plain = layer_bytes("", torch.bfloat16, size)
    rows = []
    for lever in ("LoRA all-linear r=16", "DoRA all-linear r=16"):
        value = layer_bytes(lever, torch.bfloat16, size)
        rows.append({"name": f"{lever}, bf16 base: bytes one layer keeps", "value": value, "unit": "bytes",
                     "peer": "full fine-tuning in bf16", "peer_value": plain, "ratio": value / plain,
                     "goal": ">= 1.3"})  # fmt: skip
    return rows


def compiled() -> list[dict]:
    """Rows of `torch.compile` on two layers: CPU time of the first call, CPU time and peak of a step afterwards."""
    size = {"layers": 2, "batch": 1, "seq": 256, "rounds": 7}
    eager = build(size["layers"], torch.float32)
    steps = {"eager": step_of(eager, size), "compile": step_of(torch.compile(eager), size)}
    steps["eager"]()
    # an earlier run's cache would hide the price; one process, so that its CPU time is all of it
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        began = sum(os.times()[:4])  # with the C++ compiler's
        steps["compile"]()
        first = sum(os.times()[:4]) - began
    seconds = interleaved_seconds(steps, size["rounds"])
    peak = {name: peak_bytes(step) for name, step in steps.items()}
    shared = {"peer": "eager", "goal": None}
    return [
        {"name": "compile, two layers: first call", "value": first, "unit": "s", "peer_value": min(seconds["eager"]),
         "ratio": first / min(seconds["eager"]), **shared},
        {"name": "compile, two layers: CPU time", "value": min(seconds["compile"]), "unit": "s",
         "peer_value": min(seconds["eager"]), "ratio": median_ratio(seconds, "compile", "eager"), **shared},
        {"name": "compile, two layers: peak of a step", "value": peak["compile"], "unit": "bytes",
         "peer_value": peak["eager"], "ratio": peak["compile"] / peak["eager"], **shared},
    ]  # fmt: skip


@one_thread()
def run(quick: bool) -> list[dict]:
    """Rows of every lever, on one thread. `quick`: two layers, 64 tokens, goals for the bytes only."""
    size = QUICK if quick else FULL
    rows = []
    for lever, goals in GOALS.items():
        rows += compare(lever, size, (goals[0], None, None) if quick else goals)
    return rows + in_bf16(size) + (compiled() if size["compile"] else [])
