"""Bench `lora`: our LoRA and DoRA against peft's and against the frozen layer alone, forward and backward, on the CPU.

All layers of a case stand on one frozen weight and hold the same values; that they agree is a row. Every round runs
each of them once, in turn; a ratio is the median over the rounds, and its spread (half the middle range) is a row.
"frozen" is the linear layer alone with a gradient for its input. peft runs with its defaults: fp32 adapters on a
bf16 base; "peft bf16" is `autocast_adapter_dtype=False`. Saved bytes are what autograd still holds when forward has
returned, parameters not counted; "in a model" is a two-layer Llama, beyond what the same model holds without adapters.
bf16 figures hold for CPUs with AVX512-BF16; on a GPU everything else is different.
Why some goals are missed is arithmetic (rows "floor") and memory traffic (rows "profile").
"""

import functools
import warnings
import weakref
from collections.abc import Callable
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.lab.meter import interleaved_seconds, one_thread, peak_bytes
from finetune_lab.methods.inject import inject
from finetune_lab.methods.lora_fused import FusedDoRALinear, FusedLoRALinear, dora_time_floor, lora_time_floor

NAME = "lora"
HELP = "LoRA and DoRA: time and memory against peft and against the frozen layer alone"

FULL = {"tokens": 512, "widths": {1024: 41, 2048: 17, 4096: 5}, "ranks": (8, 64),  # width -> rounds
        "lora": {1024: "<= 1.1", 2048: "<= 1.05"}, "dora": "<= 1.06"}  # fmt: skip
QUICK = {"tokens": 512, "widths": {1024: 11}, "ranks": (8,),  # few rounds: room for a noisy machine
         "lora": {1024: "<= 1.6"}, "dora": "<= 1.3"}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREE = {"fp32": "<= 1e-06", "bf16": "<= 0.01"}  # largest relative difference of output or a gradient, to peft
SAVED = "<= 0.3333"  # DoRA's saved bytes over those of peft's DoRA
LLAMA = {"vocab_size": 64, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip


class One(nn.Module):
    """A model of one layer, for peft to wrap."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear = layer


def peft_model(model: nn.Module, targets: list[str] | str, r: int, dora: bool, cast: bool = True) -> nn.Module:
    with warnings.catch_warnings():  # peft 0.21.2 reads an attribute that transformers 5.23 renamed
        warnings.simplefilter("ignore")
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, use_dora=dora)
        return get_peft_model(model, config, autocast_adapter_dtype=cast)


def contestants(width: int, r: int, dtype: torch.dtype, weight: Tensor | None = None) -> dict[str, nn.Module]:
    """Name -> layer, all in training mode on one frozen weight (width, width), with the same A and B (and m).

    weight: the frozen one; None draws it. A and B depend on the width and r only, not on the dtype.
    """
    torch.manual_seed(0)
    base = nn.Linear(width, width, bias=False).to(dtype).requires_grad_(False)
    if weight is not None:
        base.weight.copy_(weight)
    A, B = torch.randn(r, width) / width**0.5, 0.02 * torch.randn(width, r)
    layers = {"frozen": base, "LoRA": FusedLoRALinear(base, r, 2 * r), "DoRA": FusedDoRALinear(base, r, 2 * r)}
    peers = {"peft LoRA": (False, True), "peft DoRA": (True, True)}
    if dtype is not torch.float32:
        peers["peft bf16 LoRA"] = (False, False)
    for name, (dora, cast) in peers.items():
        layers[name] = peft_model(One(base), ["linear"], r, dora, cast).base_model.model.linear
    with torch.no_grad():
        for name, layer in layers.items():
            if name.startswith("peft"):
                layer.lora_A["default"].weight.copy_(A)
                layer.lora_B["default"].weight.copy_(B)
            elif name != "frozen":
                layer.A.copy_(A)
                layer.B.copy_(B)
    return {name: layer.train() for name, layer in layers.items()}


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], list[Tensor]]:
    """A function that runs forward and backward; returns output, gradient of x and of the trained parameters."""
    order = ("A", "lora_A", "B", "lora_B", "magnitude", "lora_magnitude")
    found = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    trained = list(dict.fromkeys(p for key in order for name, p in found.items() if name.startswith(key)))

    def run() -> list[Tensor]:
        x.grad = None  # as after zero_grad(set_to_none=True)
        for p in trained:
            p.grad = None
        y = layer(x)
        y.backward(grad)
        return [y.detach(), x.grad, *(p.grad for p in trained)]

    return run


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward that leave nothing behind: what `peak_bytes` needs."""
    return torch.autograd.grad(layer(x), [x, *(p for p in layer.parameters() if p.requires_grad)], grad)


def parts(layer: FusedDoRALinear, x: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """What LoRA and DoRA do beside the frozen layer's two products, each part alone: the profile of the ratios."""
    rows, A = x.detach(), layer.A.detach().to(x.dtype)
    B_t = layer.B.detach().T.to(x.dtype).contiguous()
    y, grad_x, g = torch.zeros_like(grad), torch.zeros_like(rows), grad.new_ones(grad.shape[1])

    def thin() -> None:
        down, grad_down = F.linear(rows, A), F.linear(grad, B_t)
        y.addmm_(down, B_t)
        grad_x.addmm_(grad_down, A)
        grad_down.T @ rows
        down.T @ grad

    def rowwise() -> None:
        product = grad * y.mul_(g)
        product.sum(0)
        torch.mul(grad, g, out=product)

    return {"six thin products": thin, "DoRA's norm": layer.direction_norm, "DoRA's passes over rows": rowwise}


class _Box:
    """Holds one saved tensor; it dies with the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph, a saved output would keep itself alive


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd holds when `forward()` has returned: each storage once, parameters not at all."""
    own, boxes = {p.untyped_storage().data_ptr() for p in model.parameters()}, weakref.WeakSet()

    def pack(tensor: Tensor) -> _Box:
        boxes.add(box := _Box(tensor))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        result = forward()  # keeps the graph alive
    storages = {(s := box.tensor.untyped_storage()).data_ptr(): s.nbytes() for box in boxes}
    del result
    return sum(size for place, size in storages.items() if place not in own)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest relative difference over output and gradients."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, theirs, strict=True))


def compare(width: int, r: int, dtype_name: str, size: dict) -> list[dict]:
    """Rows of one case: agreement with peft, times over the frozen layer and over our LoRA, bytes over peft's."""
    dtype, case = DTYPES[dtype_name], f"d={width} r={r} {dtype_name}"
    layers = contestants(width, r, dtype)
    x, grad = (torch.randn(size["tokens"], width).to(dtype) for _ in range(2))
    x.requires_grad_()
    steps = {name: step(layer, x, grad) for name, layer in layers.items()}
    results = {name: run() for name, run in steps.items()}
    in_fp64 = contestants(width, r, torch.float64, layers["frozen"].weight)
    wide = x.detach().double().requires_grad_(), grad.double()
    exact = {name: step(in_fp64[name], *wide)() for name in ("LoRA", "DoRA")}
    profile = parts(layers["DoRA"], x, grad)
    seconds = interleaved_seconds(steps | profile, size["widths"][width])
    middle = {name: median(times) for name, times in seconds.items()}
    rows = []

    def add(what: str, value: float, unit: str, peer=None, peer_value=None, ratio=None, goal=None) -> None:
        rows.append({"name": f"{case} {what}", "value": value, "unit": unit, "peer": peer,
                     "peer_value": peer_value, "ratio": ratio, "goal": goal})  # fmt: skip

    def add_time(mine: str, peer: str, goal: str | None) -> None:
        ratios = [a / b for a, b in zip(seconds[mine], seconds[peer], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        add(f"{mine}: time over {peer}", middle[mine], "s", peer, middle[peer], median(ratios), goal)
        add(f"{mine}: spread of the time over {peer}", (high - low) / 2, "1")

    for mine in ("LoRA", "DoRA"):
        add(f"{mine}: difference to peft {mine}", difference(results[mine], results[f"peft {mine}"]), "1",
            goal=AGREE[dtype_name])  # fmt: skip
        errors = {name: difference(results[name], exact[mine]) for name in (mine, f"peft {mine}")}
        add(f"{mine}: error against fp64", errors[mine], "1", f"peft {mine}", errors[f"peft {mine}"])
    floor, with_norm = lora_time_floor(width, r), dora_time_floor(width, r, size["tokens"])
    add("LoRA: floor of the time over frozen", floor, "1")
    add("DoRA: floor of the time over LoRA", with_norm / floor, "1")
    add_time("LoRA", "frozen", size["lora"].get(width))
    add_time("DoRA", "LoRA", size["dora"])
    for name in steps:
        if name not in ("frozen", "LoRA"):
            add_time(name, "frozen", None)
    for name in profile:
        add(f"profile, {name}: time over frozen", middle[name], "s", "frozen", middle["frozen"],
            median(a / b for a, b in zip(seconds[name], seconds["frozen"], strict=True)))  # fmt: skip
    for mine in ("LoRA", "DoRA"):
        names = (mine, f"peft {mine}")
        saved = {name: saved_bytes(layers[name], lambda name=name: layers[name](x)) for name in names}
        peak = {name: peak_bytes(functools.partial(gradients, layers[name], x, grad)) for name in names}
        for what, found in (("saved", saved), ("peak", peak)):
            add(f"{mine}: {what} bytes over peft", found[mine], "bytes", names[1], found[names[1]],
                found[mine] / found[names[1]])  # fmt: skip
    return rows


def in_a_model(dtype_name: str, tokens: int, r: int = 8) -> list[dict]:
    """What DoRA (and LoRA) on all linear layers add to the saved bytes of a small Llama, ours over peft's."""

    def held(adapt: Callable[[nn.Module], nn.Module]) -> int:
        torch.manual_seed(0)
        model = adapt(LlamaForCausalLM(LlamaConfig(**LLAMA)).to(DTYPES[dtype_name]).requires_grad_(False)).train()
        embeds = torch.randn(1, tokens, LLAMA["hidden_size"]).to(DTYPES[dtype_name]).requires_grad_()
        backbone = model.get_base_model().model if hasattr(model, "peft_config") else model.model
        return saved_bytes(model, lambda: backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state)

    frozen, rows = held(lambda model: model), []
    for mine, layer, goal in (("LoRA", FusedLoRALinear, None), ("DoRA", FusedDoRALinear, SAVED)):
        ours = held(lambda model, layer=layer: inject(model, r=r, alpha=2 * r, layer=layer)) - frozen
        theirs = held(lambda model, mine=mine: peft_model(model, "all-linear", r, mine == "DoRA")) - frozen
        rows.append({"name": f"in a model r={r} {dtype_name} {mine}: saved bytes over peft", "value": ours,
                     "unit": "bytes", "peer": f"peft {mine}", "peer_value": theirs, "ratio": ours / theirs,
                     "goal": goal})  # fmt: skip
    return rows


@one_thread()
def run(quick: bool) -> list[dict]:
    """Rows for every width, rank and dtype, on one thread; `quick` takes one small layer and its own, lower goals."""
    size = QUICK if quick else FULL
    rows = [row for d in size["widths"] for r in size["ranks"] for name in DTYPES for row in compare(d, r, name, size)]
    return rows + [row for name in DTYPES for row in in_a_model(name, size["tokens"])]
