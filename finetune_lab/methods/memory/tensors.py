"""Count the bytes of tensors that exist: what a model and its optimizer hold, and what autograd keeps for backward.

What: the measuring side of the estimator. Bytes are those of storages, each once: tied weights, views and tables that
several states share cost nothing twice.
Papers: Korthikanti et al. 2205.05198 (what a layer keeps); QLoRA 2305.14314 (4.127 bits a quantised weight).
Formula: bytes of a tensor = elements * bytes of one element.
Leaves out: temporary buffers inside an operation and the allocator's rounding (see `lab.meter.peak_bytes`).
In production: `torch.cuda.memory_allocated`, `torch.distributed._tools.mem_tracker.MemTracker`.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from finetune_lab.methods.counts import nf4_bits_per_parameter


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of what exists now: {"weights", "gradients", "optimizer"}, each storage counted once.

    Gradients that do not exist yet (`grad is None`) cost nothing, and neither does a state before the first step.
    """

    def total(tensors):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    weights = list(model.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    state = [x for entry in optimizer.state.values() for x in entry.values() if torch.is_tensor(x)]
    return {"weights": total(weights), "gradients": total(gradients), "optimizer": total(state)}


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward when `forward()` has returned: each storage once, parameters not at all.

    A graph that `forward()` itself throws away (DoRA's norm in peft) is not counted.
    With checkpointing it sees what is kept between forward and backward, not what one layer recomputes.
    Source: `torch.autograd.graph.saved_tensors_hooks`.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    saved = weakref.WeakSet()

    def pack(tensor):
        data = tensor.detach()  # without its history: a saved output would keep its own graph alive

        def box():  # lives as long as the graph that holds it
            return data

        saved.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box()):
        result = forward()
    storages = [box().untyped_storage() for box in saved]
    del result
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())


def layer_saved_bytes(hidden: int, intermediate: int, q_width: int, kv_width: int, heads: int) -> int:
    """Bytes a token that one Llama layer keeps for backward: bf16, all weights trained, attention without its matrix.

    q_width = heads * head size, kv_width = key/value heads * head size. Equal to what transformers' Llama keeps
    (checked to the byte), and about 1.5 times the 34 * hidden of Korthikanti et al.: their norms keep no fp32 copy.
    """
    norms = 2 * (4 * hidden + 4 + 2 * hidden)  # twice: the input in fp32, 1/rms in fp32, the normalised row
    inputs = 2 * (2 * hidden)  # what q, k, v read, and what gate and up read
    attention = 2 * (2 * q_width + 2 * kv_width) + 4 * heads  # q, k, v, the output; the log-sum-exp in fp32
    mlp = 4 * (2 * intermediate)  # gate, silu(gate), up, their product
    return norms + inputs + attention + mlp


def nf4_model_bytes(model: nn.Module, other_bytes: int) -> float:
    """Bytes of the weights when bitsandbytes quantises the model to NF4 with double quantisation.

    It takes every `nn.Linear` but the output layer (`lm_head`); embeddings, norms and the output layer keep
    `other_bytes` each: 2 in bf16, 4 after peft's `prepare_model_for_kbit_training`.
    """
    modules = model.named_modules()
    linears = [m for name, m in modules if isinstance(m, nn.Linear) and not name.endswith("lm_head")]
    quantised = sum(m.weight.numel() for m in linears)
    other = sum(p.numel() for p in model.parameters()) - quantised
    return quantised * nf4_bits_per_parameter(64, 256) / 8 + other * other_bytes
