"""Bench `vram`: the memory estimator against the live bytes of real training steps, configuration by configuration.

True: transformers' model class, peft's adapters, bitsandbytes' 4-bit layers and the optimizer itself run on the CPU at
small sizes, and `lab.livebytes` counts every storage (bytes are exact at any size: the estimator is a formula of shapes).
Counted: parameters, quantisation constants, optimizer states, gradients, all tensors that operations return. Not
counted: scratch space inside kernels, buffers, the allocator's rounding. ratio = larger / smaller of estimate and truth.
"""

import json
import subprocess
import sys
import warnings
from statistics import median

import torch
from accelerate.commands.estimate import estimate_training_usage
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_lab.lab.livebytes import step_bytes
from finetune_lab.methods.memory import Architecture, Recipe, estimate, from_config
from finetune_lab.methods.memory.rules import korthikanti, notes, sixteen_bytes

NAME = "vram"
HELP = "the memory estimator against live bytes of real steps, byte by byte, and what the usual rules say"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32, "vocab_size": 768, "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "max_position_embeddings": 256}  # fmt: skip
FAMILIES = {
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 64},
    "gemma3": {"model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 64},
    "gemma2": {"model_type": "gemma2", "head_dim": 64},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
}
LLAMA = ("llama tied", "llama", "mistral")
EXACT = ("weights", "quantisation state", "gradients", "optimizer", "saved")


def configurations() -> list[tuple[str, Recipe]]:
    """(family, recipe): every family with every method twice, the dials turned in between; then the special cases."""
    dials = [
        {"seq": 64, "batch": 2, "attention": "sdpa", "update": "loop"},
        {"seq": 96, "batch": 1, "attention": "eager", "checkpointing": True, "update": "foreach"},
        {"seq": 160, "batch": 1, "attention": "sdpa", "checkpointing": True, "update": "fused"},
        {"seq": 48, "batch": 3, "attention": "eager", "update": "fused", "rank": 8},
        {"seq": 40, "batch": 4, "attention": "sdpa", "update": "foreach", "dtype": "fp32"},
    ]
    found, turn = [], 0
    for family in FAMILIES:
        for method in ("full", "lora", "dora", "qlora"):
            for _ in range(2):
                dial = dict(dials[turn % len(dials)])
                turn += 1
                if family == "gemma2":
                    dial["attention"] = "eager"
                if method == "qlora":
                    dial |= {"dtype": "bf16", "kbit_fp32": turn % 2 == 0}
                found.append((family, Recipe(method=method, **dial)))
    special = [
        {"method": "full", "optimizer": "sgd"},
        {"method": "full", "optimizer": "sgd-momentum", "dtype": "fp32"},
        {"method": "full", "optimizer": "adamw-8bit"},
        {"method": "full", "optimizer": "adafactor"},
        {"method": "lora", "optimizer": "adamw-8bit"},
        {"method": "lora", "adapter_dtype": "bf16"},
        {"method": "lora", "dropout": 0.05},
        {"method": "lora", "targets": ("q_proj", "v_proj"), "checkpointing": True},
        {"method": "dora", "dropout": 0.05, "adapter_dtype": "bf16"},
        {"method": "qlora", "double_quant": False, "quant_block": 128, "kbit_fp32": False},
        {"method": "qdora", "kbit_fp32": False},
        {"method": "full", "seq": 256, "batch": 8},
    ]
    return found + [("llama tied", Recipe(**{"seq": 72, "batch": 2, **dial})) for dial in special]


def name_of(family: str, recipe: Recipe) -> str:
    words = [family, recipe.method, recipe.dtype, recipe.attention, f"B{recipe.batch}", f"S{recipe.seq}"]
    words += ["checkpointing"] * recipe.checkpointing
    words += [f"dropout {recipe.dropout}"] * bool(recipe.dropout)
    words += [f"adapters {recipe.adapter_dtype}"] * (recipe.adapter_dtype != "fp32")
    words += ["+".join(recipe.targets)] * (recipe.targets != "all-linear")
    words += ["rest fp32"] * (recipe.quantised and recipe.kbit_fp32)
    return " ".join([*words, recipe.optimizer, recipe.update])


def build(config: dict, recipe: Recipe) -> torch.nn.Module:
    """The real model of a recipe: transformers' class, bitsandbytes' layers, peft's adapter; random weights, train mode."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(0)
    settings = AutoConfig.for_model(**config, attn_implementation=recipe.attention)
    settings.use_cache = False
    model = AutoModelForCausalLM.from_config(settings, dtype=DTYPES[recipe.dtype])
    if recipe.quantised:
        quantise(model, recipe)
        model.is_loaded_in_4bit = True
        model.requires_grad_(False)
        if recipe.kbit_fp32:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if recipe.adapts:
        targets = recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)
        model = get_peft_model(
            model,
            LoraConfig(r=recipe.rank, lora_dropout=recipe.dropout, use_dora=recipe.dora, target_modules=targets),
            autocast_adapter_dtype=recipe.adapter_dtype == "fp32",
        )
    if recipe.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def quantise(model: torch.nn.Module, recipe: Recipe) -> None:
    """Replace every linear layer but the head by bitsandbytes' Linear4bit, in place (CPU, NF4)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            new = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype)
            how = {"compress_statistics": recipe.double_quant, "blocksize": recipe.quant_block, "quant_type": "nf4"}
            new.weight = Params4bit(layer.weight.data, requires_grad=False, **how)
            new.bias = layer.bias
            new = new.to("cpu")
            new.support_avx512bf16_for_cpu = False  # bitsandbytes 0.50.2: an eval pass would sever the gradients
            model.set_submodule(name, new)


def make_optimizer(parameters: list, recipe: Recipe) -> torch.optim.Optimizer:
    how = {"foreach": recipe.update == "foreach"}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-4, fused=recipe.update == "fused", **how)
    if recipe.optimizer.startswith("sgd"):
        return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9 * (recipe.optimizer == "sgd-momentum"), **how)
    if recipe.optimizer == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=1e-4)
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-4, relative_step=False, scale_parameter=False)


def truth(config: dict, recipe: Recipe) -> dict[str, int]:
    """Live bytes of a real step: `lab.livebytes.step_bytes`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(config, recipe)
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], recipe)
        ids = torch.randint(3, config["vocab_size"], (recipe.batch, recipe.seq))
        return step_bytes(model, optimizer, ids, ids.clone())


def estimated(architecture: Architecture, recipe: Recipe) -> dict[str, int]:
    """The estimator's figures under the names of `step_bytes`."""
    ledger = estimate(architecture, recipe, device="cpu", traced=True)
    stays = ledger.totals["after loading"]
    own = 16 * recipe.batch * recipe.seq
    totals = ledger.totals
    return {
        "weights": ledger.total("weights") + ledger.total("adapters"),
        "quantisation state": ledger.total("quantisation state"),
        "gradients": ledger.total("gradients"),
        "optimizer": ledger.total("optimizer"),
        "saved": totals["end of forward"] - stays,
        "own": own,
        "peak": ledger.peak,
        "moment": ledger.peak_moment,
    }
