"""What stays: weights, adapters, quantisation constants, gradients and optimizer states, tensor by tensor.

Papers: LoRA 2106.09685, DoRA 2402.09353, QLoRA 2305.14314 (section 3), LLM.int8() 2208.07339, 8-bit optimizers 2110.02861, Adafactor 1804.04235,
GaLore 2403.03507. Formulas stand beside their lines. Proved to the byte against transformers, peft, bitsandbytes and
torch.optim on the CPU; GaLore is derived from its paper and code only, no run.
Leaves out: rotary frequency buffers, and the sharding over ranks (see `ranks.py`).
In production: `sum(t.untyped_storage().nbytes())` over `model.parameters()` and `optimizer.state`.
"""

import math
from dataclasses import dataclass

from finetune_lab.methods.memory.architecture import Architecture, Linear
from finetune_lab.methods.memory.recipe import DTYPES, Recipe

BLOCK_8BIT = 256  # values that share one scale in an 8-bit optimizer state
SMALLEST_8BIT = 4096  # bitsandbytes keeps smaller tensors' states in fp32 (min_8bit_size)
NESTED_BLOCK = 256  # absmax values that share one second-level scale
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


@dataclass(frozen=True)
class Tensor:
    """A parameter: shape, bytes of one element, how many of it the model has, and what becomes of it."""

    name: str
    shape: tuple[int, ...]
    size: int
    copies: int = 1
    trained: bool = False
    adapter: bool = False
    quantised: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def targets(architecture: Architecture, recipe: Recipe) -> tuple[Linear, ...]:
    """The linear layers of one decoder layer that carry an adapter; none for full fine-tuning.

    Raises ValueError for a name that the model does not have, and for "all-linear" on a mixture of experts.
    """
    if not recipe.adapts:
        return ()
    if architecture.experts and recipe.targets == "all-linear":
        raise ValueError(
            f"{architecture.name} is a mixture of experts, where peft's 'all-linear' wraps router and experts too, which is "
            "not modelled: give targets of the attention, q_proj k_proj v_proj o_proj"
        )
    linears = architecture.linears()
    if recipe.targets == "all-linear":
        return tuple(linears)
    names = [linear.name for linear in linears]
    for name in recipe.targets:
        if name not in names:
            raise ValueError(f"target {name!r} is not a linear layer of {architecture.name}: it has {', '.join(names)}")
    return tuple(linear for linear in linears if linear.name in recipe.targets)


def tensors(architecture: Architecture, recipe: Recipe) -> list[Tensor]:
    """All parameters in the model's order: embedding, one layer (copies = layers), final norm, head."""
    h, vocab, layers = architecture.hidden, architecture.vocab, architecture.layers
    full = not recipe.adapts
    base = DTYPES[recipe.dtype]
    rest = 4 if recipe.quantised and recipe.kbit_fp32 else base  # what stays unquantised
    adapted = {linear.name for linear in targets(architecture, recipe)}
    small = DTYPES[recipe.adapter_dtype]
    found = [Tensor("embed_tokens", (vocab, h), rest, trained=full)]
    for linear in architecture.linears():
        shape = (linear.fan_out, linear.fan_in)
        found.append(Tensor(linear.name, shape, base, layers, trained=full, quantised=recipe.quantised))
        if linear.bias:
            own = base if recipe.quantised and not recipe.int8 else rest  # Linear4bit casts its bias when first called
            found.append(Tensor(f"{linear.name}.bias", (linear.fan_out,), own, layers, trained=full))
        if linear.name in adapted:
            own = {"copies": layers, "trained": True, "adapter": True}
            found.append(Tensor(f"{linear.name}.lora_A", (recipe.rank, linear.fan_in), small, **own))
            found.append(Tensor(f"{linear.name}.lora_B", (linear.fan_out, recipe.rank), small, **own))
            if recipe.dora:  # made from the base weight's norm, then cast like the rest of the adapter
                found.append(Tensor(f"{linear.name}.magnitude", (linear.fan_out,), small, **own))
        if linear.name == "o_proj" and architecture.traits.qk_norm:
            found += [Tensor(f"{x}_norm", (architecture.head_dim,), rest, layers, trained=full) for x in "qk"]
    if architecture.experts:
        wide = architecture.expert_intermediate
        router = Tensor("router", (architecture.experts, h), rest, layers, trained=full)
        first = architecture.family == "mixtral"  # in the order of the model's class
        found += [router] if first else []
        found.append(Tensor("experts.gate_up_proj", (architecture.experts, 2 * wide, h), rest, layers, trained=full))
        found.append(Tensor("experts.down_proj", (architecture.experts, h, wide), rest, layers, trained=full))
        found += [] if first else [router]
    found.append(Tensor("norms", (h,), rest, architecture.traits.norms * layers, trained=full))
    found.append(Tensor("norm", (h,), rest, trained=full))
    if recipe.objective == "reward":
        found.append(Tensor("score", (1, h), rest, trained=True))
    elif not architecture.tied:
        found.append(Tensor("lm_head", (vocab, h), rest, trained=full))
    return found


def nf4_bytes(numel: int, block: int = 64, double_quant: bool = True) -> tuple[int, int]:
    """(packed, constants) bytes of one NF4 tensor as bitsandbytes stores it: two values a byte; one absmax a block.

    constants: absmax in fp32, or with double quantisation 1 byte a block, an fp32 for each 256 of them, their mean and
    the 256 fp32 levels of that second quantisation; and the 16 fp32 levels of NF4. Each tensor has its own tables.
    """
    blocks = math.ceil(numel / block)
    nested = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 + 256 * 4
    return math.ceil(numel / 2), (nested if double_quant else 4 * blocks) + 16 * 4


def weight_bytes(tensor: Tensor, recipe: Recipe) -> tuple[int, int]:
    """(stored, quantisation constants) bytes of one tensor, one copy. int8: a byte a weight, an fp32 scale a row."""
    if tensor.quantised and recipe.int8:
        return tensor.numel, 4 * tensor.shape[0]
    if tensor.quantised:
        return nf4_bytes(tensor.numel, recipe.quant_block, recipe.double_quant)
    return tensor.numel * tensor.size, 0


def state_bytes(tensor: Tensor, recipe: Recipe) -> int:
    """Bytes of the optimizer's state for one trained tensor, one copy.

    sgd 0 · momentum n · adamw m and v, and a 4-byte step (torch.optim: the parameter's dtype) · bitsandbytes 8-bit: a
    byte each and an fp32 absmax for 256 values, fp32 below 4,096 values · paged: fp32 · Adafactor: one fp32 for each row
    and each column (vectors: all), no first moment · GaLore: projector and the moments of the projected gradient.
    """
    n, size = tensor.numel, tensor.size
    if recipe.master_weights:
        size = 4
    if recipe.optimizer_dtype:
        size = DTYPES[recipe.optimizer_dtype]
    kind = recipe.optimizer.removeprefix("paged-")
    if kind == "sgd":
        return 0
    if kind == "sgd-momentum":
        return n * size
    if kind == "adamw-8bit" and n >= SMALLEST_8BIT:
        return 2 * (n + 4 * math.ceil(n / BLOCK_8BIT))
    if kind == "adamw-8bit" or recipe.optimizer == "paged-adamw":
        return 2 * 4 * n
    if kind == "adafactor":
        if len(tensor.shape) < 2:
            return 4 * n + 4
        return 4 * (n // tensor.shape[-1] + n // tensor.shape[-2]) + 4  # and the root mean square of the weight
    if kind == "galore-adamw" and len(tensor.shape) == 2 and tensor.name in LINEAR_NAMES:
        short, long = sorted(tensor.shape)
        rank = min(recipe.galore_rank, short)
        return (rank * short + 2 * rank * long) * size
    return 2 * n * size + (4 if kind == "adamw" else 0)
