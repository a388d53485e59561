"""Real training steps of a memory recipe, and three ways to measure their bytes on the CPU.

The model is transformers' class with random weights, the adapter peft's, 4-bit and 8-bit layers and 8-bit Adam are those of
bitsandbytes. Measured: every storage (`truth`), the events of torch's allocator, the process's resident memory.
Leaves out: GPUs, GaLore, sharding. A CPU run counts the same shapes and dtypes as a GPU's, but other kernels' buffers.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_lab.lab.livebytes import step_bytes
from finetune_lab.lab.meter import peak_bytes
from finetune_lab.methods.loss import IGNORE_INDEX, chunked_loss, labelled_only_loss
from finetune_lab.methods.memory import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLEAR = Path("/proc/self/clear_refs")


def build(config: dict, recipe: Recipe) -> torch.nn.Module:
    """The real model of a recipe: transformers' class, bitsandbytes' layers, peft's adapter; random weights, train mode."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(0)
    settings = AutoConfig.for_model(**config, attn_implementation=recipe.attention)
    settings.use_cache = False
    model = AutoModelForCausalLM.from_config(settings, dtype=DTYPES[recipe.dtype])
    if recipe.quantised:
        quantise(model, recipe)
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = recipe.int8, not recipe.int8
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
    """Replace every linear layer but the head by bitsandbytes' Linear4bit (NF4) or Linear8bitLt, in place, on the CPU."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        if recipe.int8:
            new = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            new.weight = Int8Params(layer.weight.data, requires_grad=False)
        else:
            new = Linear4bit(*sizes, layer.weight.dtype)
            how = {"compress_statistics": recipe.double_quant, "blocksize": recipe.quant_block, "quant_type": "nf4"}
            new.weight = Params4bit(layer.weight.data, requires_grad=False, **how)
            new.support_avx512bf16_for_cpu = False  # bitsandbytes 0.50.2: an eval pass would sever the gradients
        new.bias = layer.bias
        model.set_submodule(name, new.to("cpu"))


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
    """Live bytes of a real step: `lab.livebytes.step_bytes`. Other `logits` than "full": the loss of `methods.loss`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(config, recipe)
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], recipe)
        ids = torch.randint(3, config["vocab_size"], (recipe.batch, recipe.seq))
        labels = ids.clone()
        if recipe.logits == "full":
            return step_bytes(model, optimizer, ids, labels)
        others = torch.arange(recipe.batch * (recipe.seq - 1)) >= round(
            recipe.labelled * recipe.batch * (recipe.seq - 1)
        )
        labels[:, 1:][others.view(recipe.batch, -1)] = IGNORE_INDEX
        inner = model.get_base_model() if recipe.adapts else model
        head = labelled_only_loss if recipe.logits == "labelled" else chunked_loss

        def loss_of() -> torch.Tensor:
            return head(inner.model(input_ids=ids).last_hidden_state, inner.lm_head.weight, labels)

        return step_bytes(model, optimizer, ids, labels, loss_of)


def allocator_peak(config: dict, recipe: Recipe) -> int:
    """Bytes above what stays at the fullest of an untraced step, from the events of torch's CPU allocator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(config, recipe)
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], recipe)
        ids = torch.randint(3, config["vocab_size"], (recipe.batch, recipe.seq))

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return peak_bytes(step)


RESIDENT = """
import ctypes, sys, torch
from pathlib import Path
from finetune_lab.lab.models import load
torch.set_num_threads(1)
model, _ = load("tiny")
model.train()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(3, 1700, (BATCH, SEQ))
def step():
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
def resident(what):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(what))
step()
ctypes.CDLL(None).malloc_trim(0)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
step()
print(resident("VmHWM") - before)
"""


def resident_peak(batch: int, seq: int) -> int:
    """Growth of the process's resident memory in one step of the tiny model (a fresh process, Linux only)."""
    code = RESIDENT.replace("BATCH", str(batch)).replace("SEQ", str(seq))
    # every tensor gets pages of its own and gives them back, so that the process is no larger than its tensors
    settings = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the measured process failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])
