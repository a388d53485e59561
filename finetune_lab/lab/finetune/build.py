"""The model of a recipe: base weights in the right precision, 4-bit where asked for, and the adapter's configuration.

    full    fp32 weights (bf16 and fp16 compute under autocast: the weights themselves stay fp32)
    lora    frozen weights in the compute precision, adapter in fp32 (peft's default)
    dora    the same with `use_dora`
    qlora   frozen linear layers in NF4 with double quantisation (bitsandbytes), adapter in bf16 (TRL's choice)

peft, and what transformers needs to train, take seconds to import, and the preflight asks this module about the machine:
they are imported where they are used. Leaves out: 8-bit, models sharded at load time. In production: `trl.ModelConfig`, `trl.get_quantization_config`.
"""

import os
import warnings
from pathlib import Path

import torch

from finetune_lab.environment import threads_for
from finetune_lab.errors import UserError
from finetune_lab.lab import models
from finetune_lab.lab.finetune.recipe import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision() -> str:
    """bf16 on a GPU that computes in it, else fp32: on a CPU bf16 is often slower, and fp16 is not trained with."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def parameters_of(name: str) -> int:
    """Number of parameters, read from the headers of the model's files; the model is fetched if need be."""
    return models.count_parameters(models.locate(name))


def check_machine(recipe: Recipe) -> None:
    """Raise UserError for what this machine cannot do."""
    together = int(os.environ.get("WORLD_SIZE", "1"))
    if device_of(recipe.model) != "cpu" and torch.cuda.device_count() > 1 and together == 1:
        raise UserError(
            f"this machine shows {torch.cuda.device_count()} GPUs and one process uses one of them: start with "
            f"`torchrun --nproc-per-node {torch.cuda.device_count()} -m finetune_lab {recipe.trainer()} ...`, or set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision fp16 needs a GPU: choose fp32 or bf16 on a CPU.")


def load(recipe: Recipe):
    """`(model, tokenizer)` of a completed recipe, without the adapter, on the device that trains."""
    check_machine(recipe)
    dtype = torch.float32 if recipe.method == "full" else DTYPES[recipe.precision]
    if recipe.method != "qlora":
        return models.load(recipe.model, dtype=dtype, device=device_of(recipe.model), seed=None)
    tokenizer = models.load_tokenizer(recipe.model)
    model = load_4bit(models.locate(recipe.model), dtype, device_of(recipe.model))
    torch.set_num_threads(threads_for(recipe.model))
    return model, tokenizer


def device_of(name: str) -> str:
    """Where a model trains: the CPU for `tiny`, else the first GPU, or this process's own under torchrun."""
    if name == "tiny" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def load_4bit(folder: Path, dtype: torch.dtype, device: str):
    """The model in `folder` with its linear layers in NF4, double quantisation, computing in `dtype`.

    Two faults of bitsandbytes 0.50.2 on CPUs are kept away: a row length that is no multiple of the block of 64 gives
    wrong weights without an error, so it is refused; and the first forward in eval mode on a CPU with AVX512-BF16
    repacks the weights in place and cuts the gradient, so that path is switched off.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with models._no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, device_map={"": device},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
        )  # fmt: skip
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            if device == "cpu" and module.in_features % 64:
                raise UserError(
                    f"qlora on a CPU: layer {name} has {module.in_features} inputs, no multiple of 64, and bitsandbytes "
                    "0.50.2 then computes wrong numbers without an error. Use method lora, or a GPU."
                )
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def adapter_config(recipe: Recipe, model):
    """peft's `LoraConfig` of the adapter; None for full fine-tuning. Raises UserError for a target that is no layer."""
    from peft import LoraConfig

    if recipe.method == "full":
        return None
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    head = {name for name in linear if getattr(model, name, None) is model.get_output_embeddings()}
    if unknown := set(recipe.targets) - (linear - head) - {"all-linear"}:
        raise UserError(
            f"targets: {recipe.model} has no linear layer {min(unknown)!r} to adapt; choose among "
            f"{', '.join(sorted(linear - head))}, or all-linear."
        )
    targets = recipe.targets[0] if recipe.targets == ("all-linear",) else list(recipe.targets)
    return LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=targets,
        use_dora=recipe.method == "dora", task_type="CAUSAL_LM",
    )  # fmt: skip


def quiet_peft() -> warnings.catch_warnings:
    """Use as `with quiet_peft():` around peft 0.21.2, which reads a name that transformers 5.23 has renamed."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


def trained_parameters(model) -> int:
    """Parameters that get a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
