"""Bench `vram`: the memory estimator against the live bytes of real training steps, configuration by configuration.

True: transformers' model class, peft's adapters, bitsandbytes' 4-bit and 8-bit layers and the optimizer itself run on the CPU at
small sizes, and `lab.livebytes` counts every storage (bytes are exact at any size: the estimator is a formula of shapes).
Counted: parameters, quantisation constants, optimizer states, gradients, all tensors that operations return. Not
counted: scratch space inside kernels, buffers, the allocator's rounding. ratio = larger / smaller of estimate and truth.
"""

import logging
from statistics import median

from accelerate.commands.estimate import estimate_training_usage

from finetune_lab.lab.real_steps import CLEAR, allocator_peak, resident_peak, truth
from finetune_lab.methods.memory import Architecture, Recipe, estimate, from_config
from finetune_lab.methods.memory.rules import korthikanti, notes, sixteen_bytes

NAME = "vram"
HELP = "the memory estimator against live bytes of real steps, byte by byte, and what the usual rules say"

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
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3 moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}
TINY = {"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 1792,
        "tie_word_embeddings": True}  # fmt: skip
WITNESSES = [
    ("llama tied", Recipe(method="full", batch=2, seq=128)),
    ("llama", Recipe(method="full", batch=1, seq=160, checkpointing=True, dtype="fp32")),
    ("llama tied", Recipe(method="lora", batch=2, seq=128)),
    ("qwen3", Recipe(method="lora", batch=2, seq=128, attention="eager", checkpointing=True)),
    ("llama", Recipe(method="dora", batch=2, seq=128)),
    ("mistral", Recipe(method="qlora", batch=2, seq=128, kbit_fp32=False)),
    ("phi3", Recipe(method="full", batch=2, seq=128)),
    ("gemma3", Recipe(method="full", batch=2, seq=128, update="loop")),
]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # what an adapter can have in a mixture of experts
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
                if "moe" in family or family == "mixtral":
                    dial["targets"] = ATTENTION
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
        {"method": "full", "logits": "labelled", "labelled": 0.25},
        {"method": "lora", "logits": "chunked", "labelled": 0.25},
        {"method": "full", "logits": "chunked", "dtype": "fp32"},
        {"method": "lora-int8", "kbit_fp32": False},
        {"method": "lora-int8", "checkpointing": True},
    ]
    return found + [("llama tied", Recipe(**{"seq": 72, "batch": 2, **dial})) for dial in special]


def name_of(family: str, recipe: Recipe) -> str:
    words = [family, recipe.method, recipe.dtype, recipe.attention, f"B{recipe.batch}", f"S{recipe.seq}"]
    words += ["checkpointing"] * recipe.checkpointing
    words += [f"dropout {recipe.dropout}"] * bool(recipe.dropout)
    words += [f"adapters {recipe.adapter_dtype}"] * (recipe.adapter_dtype != "fp32")
    words += ["+".join(recipe.targets)] * (recipe.targets != "all-linear")
    words += [f"logits {recipe.logits}"] * (recipe.logits != "full")
    words += ["rest fp32"] * (recipe.quantised and recipe.kbit_fp32)
    return " ".join([*words, recipe.optimizer, recipe.update])


def estimated(architecture: Architecture, recipe: Recipe, traced: bool = True) -> dict:
    """The estimator's figures under the names of `step_bytes`, and the moment of the peak."""
    ledger = estimate(architecture, recipe, device="cpu", traced=traced)
    totals = ledger.totals
    return {
        "weights": ledger.total("weights") + ledger.total("adapters"),
        "quantisation state": ledger.total("quantisation state"),
        "gradients": ledger.total("gradients"),
        "optimizer": ledger.total("optimizer"),
        "saved": totals["end of forward"] - totals["after loading"],
        "peak": ledger.peak,
        "above": ledger.peak - totals["after loading"] - 16 * recipe.batch * recipe.seq,
        "moment": ledger.peak_moment,
    }


def apart(a: float, b: float) -> float:
    """Larger over smaller: 1 where both agree, whichever way they differ."""
    return max(a, b) / min(a, b) if min(a, b) > 0 else 1.0 if a == b else float("inf")


def row(name: str, value: float, unit: str, peer: str = "", peer_value=None, ratio=None, goal=None) -> dict:
    return {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": ratio,
            "goal": goal}  # fmt: skip


def witnesses(cells: list[tuple[str, Recipe]], process: bool) -> list[dict]:
    """Two measures that do not go through the tracker: the allocator's events, and the process itself (5 s)."""
    rows = []
    for family, recipe in cells:
        config = SIZES | FAMILIES[family]
        mine = estimated(from_config(config), recipe, traced=False)["above"]
        true = allocator_peak(config, recipe)
        rows.append(row(f"untraced: {name_of(family, recipe)}", mine, "bytes", "allocator events", true,
                        apart(mine, true), "<= 1.01"))  # fmt: skip
    if process and CLEAR.exists():
        recipe = Recipe(method="full", dtype="fp32", batch=16, seq=256)
        mine = estimated(from_config(TINY), recipe, traced=False)["above"]
        true = resident_peak(recipe.batch, recipe.seq)
        rows.append(row("tiny model, one step: resident memory", mine, "bytes", "process (VmHWM)", true,
                        apart(mine, true), "<= 1.05"))  # fmt: skip
    return rows


def accelerate_rule(architecture: Architecture, recipe: Recipe) -> int:
    """`accelerate estimate-memory`, column "training using Adam": the fullest of its stages."""
    kind = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[recipe.dtype]
    return max(estimate_training_usage(4 * architecture.parameters(), kind).values())


RULES = {
    "accelerate estimate-memory": accelerate_rule,
    "16 bytes a trained parameter": sixteen_bytes,
    "16 bytes and 2bshL (course notes)": notes,
    "16 bytes and 34sbh + 5as²b (2205.05198)": korthikanti,
}


def errors_of_rules(cells: list[tuple[Architecture, Recipe, int]], what: str) -> list[dict]:
    """For each rule the median and the worst error in percent of the true peak."""
    rows = []
    for name, rule in RULES.items():
        errors = [100 * (rule(architecture, recipe) / true - 1) for architecture, recipe, true in cells]
        worst = max(errors, key=abs)
        rows.append(row(f"{name}, {what}: median |error|", median(abs(e) for e in errors), "%"))
        rows.append(row(f"{name}, {what}: worst error", worst, "%"))
    return rows


def popular() -> list[tuple[Architecture, Recipe]]:
    """Llama-3.2-1B and Llama-3.1-8B in the recipes people run."""
    sizes = {
        "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "tie_word_embeddings": True},
        "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    }
    shared = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    return [
        (from_config(shared | size, name), Recipe(method=method, seq=seq, checkpointing=checkpointing))
        for name, size in sizes.items()
        for method in ("full", "lora", "dora", "qlora")
        for seq in (512, 2048)
        for checkpointing in (False, True)
    ]


def run(quick: bool) -> list[dict]:
    """Claims first, then the worst cells, the second witnesses, the usual rules, and a row for every configuration."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    cells = configurations()
    cells = cells[:8:2] + cells[37:38] + cells[-1:] if quick else cells
    found, exact = [], {key: 0 for key in EXACT}
    for family, recipe in cells:
        config = SIZES | FAMILIES[family]
        true, mine = truth(config, recipe), estimated(from_config(config), recipe)
        for key in EXACT:
            exact[key] = max(exact[key], abs(mine[key] - true[key]))
        goal = "<= 1.001" if family in LLAMA else "<= 1.01"
        found.append(row(f"{name_of(family, recipe)} (peak: {mine['moment']})", mine["peak"], "bytes", "live bytes",
                         true["peak"], apart(mine["peak"], true["peak"]), goal))  # fmt: skip
    llama = [r for r, (family, _) in zip(found, cells, strict=True) if family in LLAMA]
    others = [r for r in found if r not in llama]
    rows = [row("configurations", len(cells), "", goal=None if quick else ">= 60")]
    rows += [row(f"{key}: largest difference", size, "bytes", goal="<= 0") for key, size in exact.items()]
    for name, group, goal in (("llama family", llama, "<= 1.001"), ("other families", others, "<= 1.01")):
        worst = max(group, key=lambda r: r["ratio"])
        rows.append(row(f"peak, {name}: worst of {len(group)}", worst["value"], "bytes", "live bytes",
                        worst["peer_value"], worst["ratio"], goal))  # fmt: skip
    equal = sum(r["value"] == r["peer_value"] for r in found)
    rows.append(row("peaks equal to the byte", equal, f"of {len(found)}"))
    for place, cell in enumerate(sorted(found, key=lambda r: -r["ratio"])[:3], start=1):
        rows.append(row(f"worst cell {place}: {cell['name']}", cell["value"], "bytes", "live bytes",
                        cell["peer_value"], cell["ratio"]))  # fmt: skip
    rows += witnesses(WITNESSES[:1] if quick else WITNESSES, process=not quick)
    same = [(from_config(SIZES | FAMILIES[family]), recipe, r["peer_value"])
            for (family, recipe), r in zip(cells, found, strict=True)]  # fmt: skip
    rows += errors_of_rules(same, "same configurations")
    shapes = [(architecture, recipe, estimate(architecture, recipe).peak) for architecture, recipe in popular()]
    rows += errors_of_rules(shapes, "Llama 1B and 8B (peer: the estimate)")
    return rows + found
