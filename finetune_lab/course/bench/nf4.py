"""Bench `nf4`: our NF4 against bitsandbytes' CPU build and the naive forms; what formats, blocks and code books cost.

Speed: one thread, interleaved, medians of ratios. "naive" is the distance to all 16 levels and its argmin, 4 million
values at a time (256 MiB of distances), and for restoring the plain look-up with 64-bit indices. "out reused" writes into one tensor again
and again, which bitsandbytes 0.50.2 cannot on a CPU; "fresh memory" allocates as it does. Where the allocator gives a 64 MB
result new pages, the page faults cost bitsandbytes 30 of 34 ms and reusing wins; where it hands out pages that the process
has touched before, bitsandbytes' own kernel is two to four times as fast as our look-up. Both happen within one process.
Errors: relative to the variance of the weights. SmolLM2's weights here were restored from a 4-bit file (Q4_1, blocks of
32), so that formats of equal steps look better on them than on weights never rounded; without its files its rows are
left out, and one row says so. Scores: the tiny model fine-tuned on tickets, adapter merged, then rounded; one seed, to
see whether anything breaks (`bench qlora` has five).
"""

from statistics import median

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from finetune_lab.lab import bnb_faults, tasks, train
from finetune_lab.lab.evaluate import evaluate, general, perplexity
from finetune_lab.lab.meter import interleaved_seconds, median_ratio, one_thread, peak_bytes
from finetune_lab.lab.models import load
from finetune_lab.lab.rounding import FORMATS, errors, optimality, rounded, weights_by_kind
from finetune_lab.lab.tiers import TINY
from finetune_lab.methods.adam8bit import AdamW8bit
from finetune_lab.methods.codebooks import nf4_code
from finetune_lab.methods.nf4 import bits_per_parameter, dequantize, quantize, simple_dequantize
from finetune_lab.methods.nf4_linear import NF4Linear

NAME = "nf4"
HELP = "NF4 against bitsandbytes on the CPU: speed, bits, errors of formats, block sizes and code books, faults"

FULL = {"shapes": {"fp32": [(1024, 1024), (2048, 2048), (4096, 4096)], "bf16": [(2048, 2048), (8192, 4096)]},
        "rounds": 7, "goals": (">= 6", ">= 20"), "samples": 2**20, "items": 40, "layers": (1024, 2048)}  # fmt: skip
QUICK = {"shapes": {"fp32": [(1024, 1024)]}, "rounds": 5, "goals": (">= 2", ">= 5"), "samples": 2**16,
         "items": 20, "layers": (256,)}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGE = 64e6  # bytes of output from which fresh memory decides bitsandbytes' time
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TENSOR = 10**9  # one scale for all


def row(name: str, value: float, unit: str = "1", peer: str | None = None, peer_value: float | None = None,
        ratio: float | None = None, goal: str | None = None) -> dict:  # fmt: skip
    return {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": ratio,
            "goal": goal}  # fmt: skip


def naive_quantize(w: Tensor, code: Tensor) -> Tensor:
    """Codes of all values by their distance to each of the 16 levels."""
    codes = []
    for part in w.flatten().split(2**22):
        x = part.float().view(-1, 64)
        x = x * (1 / x.abs().amax(1, keepdim=True))
        codes.append((x.flatten()[:, None] - code).abs().argmin(1))
    codes = torch.cat(codes).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2]


def speed(dtype: str, shape: tuple[int, int], size: dict) -> list[dict]:
    """Rows of one weight: bits agree, times faster than bitsandbytes and the naive forms, memory."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    code, out, q = nf4_code(), torch.empty_like(w), quantize(w)
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4")
    theirs = bnb.functional.dequantize_4bit(packed, state)
    seconds = interleaved_seconds({
        "quantize": lambda: quantize(w),
        "bnb quantize": lambda: bnb.functional.quantize_4bit(w, quant_type="nf4"),
        "naive quantize": lambda: naive_quantize(w, code),
        "restore": lambda: dequantize(q, out=out),
        "restore fresh": lambda: dequantize(q),
        "bnb restore": lambda: bnb.functional.dequantize_4bit(packed, state),
        "naive restore": lambda: simple_dequantize(q.packed, q.scales, code, w.shape).to(w.dtype),
    }, size["rounds"])  # fmt: skip
    large = ">= 2" if out.nbytes >= LARGE else None
    name = f"{dtype} {shape[0]}x{shape[1]}"
    wrong = int((packed.flatten() != q.packed).sum() + (state.absmax != q.absmax).sum() + (theirs != out).sum())
    peak = peak_bytes(lambda: quantize(w))
    rows = [row(f"{name}: bytes, scales and values unlike bitsandbytes'", wrong, "count", goal="<= 0")]
    for what, mine, peer, goal in [
        ("quantise, times faster than bitsandbytes", "quantize", "bnb quantize", size["goals"][0]),
        ("quantise, times faster than naive", "quantize", "naive quantize", size["goals"][1]),
        ("restore into out reused, times faster than bitsandbytes", "restore", "bnb restore", large),
        ("restore into out reused, times faster than naive", "restore", "naive restore", ">= 4"),
        ("restore into fresh memory, times faster than bitsandbytes", "restore fresh", "bnb restore", None),
        ("restore into fresh memory, times faster than naive", "restore fresh", "naive restore", None),
    ]:
        rates = [w.numel() / median(seconds[key]) / 1e9 for key in (mine, peer)]
        ratio = median_ratio(seconds, peer, mine)
        rows.append(row(f"{name}: {what}", rates[0], "10^9 values/s", peer, rates[1], ratio, goal))
    goal = "<= 1.3" if dtype == "fp32" and out.nbytes >= LARGE else None  # bf16: the result alone is 0.28 of the input
    rows.append(row(f"{name}: quantise, input and peak of the rest over input", 1 + peak / w.nbytes, goal=goal))
    return rows


def bits() -> list[dict]:
    """Bits a weight, counted from the bytes that ours and bitsandbytes keep."""
    w = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    rows = []
    for double, name in ((False, "scales in fp32"), (True, "double quantization")):
        packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
        kept = packed.nbytes + state.absmax.nbytes
        if double:
            kept += state.state2.absmax.nbytes + state.offset.nbytes
        ours = bits_per_parameter(quantize(w, double_quant=double))
        rows.append(row(f"bits a parameter, {name}", ours, "bit", "bitsandbytes", 8 * kept / w.numel()))
    return rows


def error_rows(kinds: dict[str, Tensor]) -> list[dict]:
    """Errors of each format on each kind of weights; then NF4 over block sizes."""
    rows = []
    for kind, w in kinds.items():
        cases = [(name, restore, 64) for name, restore in FORMATS.items()]
        cases += [("NF4", FORMATS["NF4"], block) for block in (*BLOCKS, TENSOR) if block != 64]
        cases += [("INT8", FORMATS["INT8"], TENSOR)]
        for name, restore, block in cases:
            label = f"{kind}, {name}, {'one scale' if block == TENSOR else f'block {block}'}"
            rows += [row(f"{label}: {what}", value) for what, value in errors(w, restore(w, block)).items()]
    return rows


MODEL_FORMATS = [("NF4", 64), ("NF4", 4096), ("FP4", 64), ("INT4", 64), ("INT4 zero-point", 64), ("INT8", 64),
                 ("symmetric quantiles", 64)]  # fmt: skip


def base_rows(name: str, items: int, formats: list) -> list[dict]:
    """Perplexity of unseen stories of a base model, as it is (peer) and rounded; for tiny also what it knows."""
    model, tokenizer = load(name)
    stories = [i["text"] for i in tasks.load_task("general", "test", 8 * items) if i["kind"] == "story"][:items]

    def measure() -> dict[str, float]:
        if name == "tiny":
            found = general(model, tokenizer, items)
            return {what.replace("_", " "): value for what, value in found.items()}
        return {"story perplexity": perplexity(model, tokenizer, stories, batch_size=16)}

    whole, rows = measure(), []
    for label, block in formats:
        with rounded(model, FORMATS[label], block):
            found = measure()
        rows += [row(f"{name}, {label}, block {block}: {what}", value, peer="fp32", peer_value=whole[what])
                 for what, value in found.items()]  # fmt: skip
    return rows


def tuned_rows(items: int, seed: int = 0) -> list[dict]:
    """Exact match of tickets for the fine-tuned tiny model, adapter merged: as it is (peer), and rounded."""
    recipe = TINY.recipes["extract"]
    model, tokenizer = load("tiny", seed=seed)
    model = train.add_lora(model, recipe.rank, seed=seed)
    data = tasks.load_task("extract", "train", recipe.items, seed)
    train.sft(model, tokenizer, data, steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lora_lr, seed=seed)
    model, rows = model.merge_and_unload(), []
    whole = evaluate(model, tokenizer, "extract", items)["exact_match"]
    for label, block in MODEL_FORMATS:
        with rounded(model, FORMATS[label], block):
            found = evaluate(model, tokenizer, "extract", items)["exact_match"]
        rows.append(row(f"tiny fine-tuned on tickets, {label}, block {block}: exact match, one seed", found, peer="fp32",
                        peer_value=whole))  # fmt: skip
    return rows


def layer_rows(width: int, rounds: int) -> list[dict]:
    """What a frozen layer's forward and input gradient cost in 4 bits, over the same in full precision; 512 tokens."""
    torch.manual_seed(0)
    dense = nn.Linear(width, width, bias=False).requires_grad_(False)
    theirs = bnb.nn.Linear4bit(width, width, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.load_state_dict(dense.state_dict())
    layers = {"nn.Linear": dense, "NF4Linear": NF4Linear.from_linear(dense),
              "Linear4bit": bnb_faults.make_safe(theirs.to("cpu"))}  # fmt: skip
    x = torch.randn(512, width, requires_grad=True)

    def step(layer: nn.Module):
        return lambda: torch.autograd.grad(layer(x).sum(), x)

    seconds = interleaved_seconds({name: step(layer) for name, layer in layers.items()}, rounds)
    return [
        row(f"layer {width}x{width}, 512 tokens: time of {name} over nn.Linear", median(seconds[name]), "s",
            "nn.Linear", median(seconds["nn.Linear"]), median_ratio(seconds, name, "nn.Linear"))
        for name in ("NF4Linear", "Linear4bit")
    ]  # fmt: skip


def adam_rows(steps: int = 40) -> list[dict]:
    """8-bit AdamW against bitsandbytes': largest difference of the weights after the steps; bytes of state."""
    g = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(256, 192, generator=g))
    theirs = nn.Parameter(ours.detach().clone())
    one, other = AdamW8bit([ours]), bnb.optim.AdamW8bit([theirs])
    for _ in range(steps):
        ours.grad = torch.randn(256, 192, generator=g)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    difference = float((ours - theirs).detach().abs().max())
    return [
        row(f"8-bit AdamW: largest difference to bitsandbytes after {steps} steps", difference, goal="<= 0"),
        row("8-bit AdamW: bytes of state a parameter", one.state_bytes() / ours.numel(), "B", "fp32 states", 8.0),
        row("8-bit scales: what 0 comes back as beside 1, bitsandbytes", bnb_faults.zero_comes_back_as()),
    ]


def fault_rows() -> list[dict]:
    """Faults of bitsandbytes on this CPU: relative error of what it restores (value) and of ours (peer)."""
    rows, scale = [], torch.logspace(-2, 0, 224)
    w = torch.randn(64, 224, generator=torch.Generator().manual_seed(0)) * scale
    if bnb_faults.has_avx512():
        restored = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(w, quant_type="nf4"))
        ours = float((dequantize(quantize(w)) - w).norm() / w.norm())
        wrong = float((restored - w).norm() / w.norm())
        rows.append(row("fault 1, rows of 224: relative error of bitsandbytes", wrong, peer="ours", peer_value=ours))
    if bnb_faults.repacks_in_eval():
        layer = bnb.nn.Linear4bit(192, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.weight.data = w[:, :192].clone()
        layer = layer.to("cpu").eval()
        before = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        with torch.no_grad():
            layer(torch.randn(1, 192))
        after = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).view_as(before)
        wrong = float((after - w[:, :192]).norm() / w[:, :192].norm())
        right = float((before - w[:, :192]).norm() / w[:, :192].norm())
        rows.append(row("fault 2, after one forward in eval mode: relative error of what is restored", wrong,
                        peer="before it", peer_value=right))  # fmt: skip
    return rows


@one_thread()
def run(quick: bool) -> list[dict]:
    """All rows, on one thread; `quick` takes one small weight, few samples and items, and lower goals."""
    size = QUICK if quick else FULL
    rows = [r for dtype, shapes in size["shapes"].items() for shape in shapes for r in speed(dtype, shape, size)]
    rows += bits()
    for width in size["layers"]:
        rows += layer_rows(width, size["rounds"])
    rows += adam_rows() + fault_rows()
    kinds = weights_by_kind(size["samples"], real=not quick)  # from here on nothing is timed
    rows += error_rows(kinds)
    rows += [row(f"code book: {what}", *found) for what, found in optimality(kinds["Gaussian"]).items()]
    rows += base_rows("tiny", size["items"], MODEL_FORMATS[:2] if quick else MODEL_FORMATS)
    if not quick:
        rows += tuned_rows(size["items"])
        if "smollm2" in kinds:
            rows += base_rows("smollm2-135m", 24, MODEL_FORMATS)
        else:
            rows.append(row("smollm2: left out, its files are not on this machine", 1, "count"))
    return rows
