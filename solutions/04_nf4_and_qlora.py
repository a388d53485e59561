# ---
# jupyter:
#   finetune_lab:
#     title: NF4 and QLoRA
#     minutes: 95
#     needs: lesson 03
#     budget: lesson
# ---

# %% [markdown]
# # 04 · NF4 and QLoRA
# **You store a frozen model in a quarter of its bytes, train adapters on top, and merge them without losing them.**
#
# Minutes: 95. You need: lesson 03 (LoRA), a little PyTorch. No GPU.
#
# You will be able to:
# - derive the sixteen levels of NF4, and quantise a tensor with them bit for bit as bitsandbytes does;
# - say what a block size and double quantization cost and save, in bytes;
# - write the layer that QLoRA trains through, and explain what it costs in time;
# - merge an adapter the right way, and prove that the usual way destroys it.

# %%
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.special import ndtri

from finetune_lab.course import bench, check, plots, predict
from finetune_lab.lab import generate, tasks, tiers, train
from finetune_lab.lab.evaluate import general
from finetune_lab.lab.models import load
from finetune_lab.lab.outliers import plant_outliers
from finetune_lab.methods.inject import active_layers, find_targets, inject

tier = tiers.tier()
N = min(tier.test_items, 100)  # questions for each test
base, tokenizer = load()
LINEAR = find_targets(base, "all-linear")  # every linear layer but the head
COUNT = sum(base.get_submodule(path).weight.numel() for path in LINEAR)
print(f"{tier.name} model: {base.num_parameters():,} parameters,")
print(f"{COUNT:,} of them in {len(LINEAR)} linear layers")


def weights(model: nn.Module) -> list[Tensor]:
    """The weights of the linear layers, in order."""
    return [model.get_submodule(path).weight.detach() for path in LINEAR]


def with_weights(model: nn.Module, change) -> nn.Module:
    """A copy of the model in which every linear layer's weight w became change(w)."""
    model = copy.deepcopy(model)
    for path in LINEAR:
        weight = model.get_submodule(path).weight
        weight.data = change(weight.data)
    return model


def report(model: nn.Module, name: str) -> float:
    """Print what the model still knows of its world; return its perplexity on stories."""
    known = general(model, tokenizer, N)
    facts, sums, story = 100 * known["facts"], 100 * known["sums"], known["story_perplexity"]
    print(f"{name:20} facts {facts:3.0f} %, sums {sums:3.0f} %, story perplexity {story:,.2f}")
    return story


# %% [markdown]
# ## The problem in one number
# LoRA trains little, yet the frozen weights must be there: 2 bytes each in 16 bits. An 8B model: 16 GB before the first
# token. Four bits would be a quarter. So round every weight to 15 even steps, `round(w / largest * 7)`, and ask again.
#
# One honest preparation. Real models hold a few huge weights, our toy none. So we plant some: one hidden unit of each MLP
# is made 20 times smaller where it is written and 20 times larger where it is read. The model computes the same.

# %%
model = copy.deepcopy(base)
plant_outliers(model, 20)
for name, some in {"as it came": base, "with outliers": model}.items():
    largest = max(w.abs().max() / w.std() for w in weights(some))
    print(f"{name:14} largest weight {largest:.1f} standard deviations")


def naive(w: Tensor) -> Tensor:
    """4 bits the obvious way: one scale for the tensor, even steps."""
    step = w.abs().max() / 7
    return (w / step).round() * step


report(base, "as it came")
report(model, "with outliers, fp32")
ruined = report(with_weights(model, naive), "naive 4 bits")

# %% [markdown]
# The same function, and 4 bits erase it. (A real model has never heard of these towns: there, watch the perplexity. And
# it needs no planting: the largest weight of SmolLM2-135M stands at 51 standard deviations.) QLoRA stores a model in
# 4 bits so that this does not happen, and then trains on top of it (arXiv 2305.14314).
#
# ## Why quantiles
# Sixteen levels are few. Put them where the weights are. Trained weights are close to a bell curve:

# %%
z = torch.cat([(w / w.std()).flatten() for w in weights(base)])[: 2**22]  # 4 million will do
for k in (1, 2, 3):
    ours, normal = (z.abs() < k).float().mean(), torch.special.erf(torch.tensor(k / 2**0.5))
    print(f"within {k} standard deviations: {100 * ours:.1f} %, normal {100 * normal:.1f} %")

# %% [markdown]
# Levels at equal steps of *probability* are quantiles, $\Phi^{-1}(p)$: dense in the middle, wide at the ends. Four decisions
# make NF4 out of that:
# - **an exact zero**, so that zero weights and padding stay zero;
# - **both ends at ±1**, so that the largest weight of a block is kept exactly;
# - sixteen is even, zero is one of them: **seven below and eight above**;
# - $\Phi^{-1}(1)$ is infinite, so probabilities stop at an **offset**: the mean of $1-1/32$ and $1-1/30$, half a step
#   below 1 for the longer and the shorter side, 0.9677083.
#
# ### Exercise 4.1 · The levels of NF4 (10 minutes)
# Upper half: 8 equal steps of probability from the offset down to 1/2. Lower half: 7 steps, mirrored. Both end at 1/2,
# whose quantile is 0: drop it from both, add one zero. Compute the quantiles in double, `torch.linspace(a, b, n).double()`.
# The table is to be bitsandbytes' bit for bit: cast to fp32, *then* divide by the largest.

# %%
from finetune_lab.methods.codebooks import NF4_OFFSET


def nf4_code() -> Tensor:
    """The 16 levels of NF4 (16,), ascending, fp32, from -1 to 1. `ndtri` is the normal quantile."""
    # BEGIN SOLUTION
    above = ndtri(torch.linspace(NF4_OFFSET, 0.5, 9)[:-1].double())
    below = -ndtri(torch.linspace(NF4_OFFSET, 0.5, 8)[:-1].double())
    levels = torch.cat([below, torch.zeros(1), above]).float().sort().values
    return levels / levels.max()
    # END SOLUTION


nf4_code = check.nf4_code(nf4_code)
NF4 = nf4_code()
print("NF4:          ", " ".join(f"{x:.3f}" for x in NF4))

# %% [markdown]
# Many notes print another formula and the name NF4: $\Phi^{-1}((2i+1)/32)$, the middles of 16 equal bins. Compare.

# %%
from finetune_lab.methods.codebooks import symmetric_quantile_code

middles = symmetric_quantile_code()
print("notes' formula:", " ".join(f"{x:.3f}" for x in middles))
difference, smallest = (middles - NF4).abs().max(), middles.abs().min()
print(f"largest difference {difference:.3f}; smallest magnitude {smallest:.3f} for 0")

# %% [markdown]
# "Each level holds the same share of the weights", the notes go on: 6.25 % each. Predict: what share of normal weights falls
# on the *emptiest* level of NF4, with blocks of 64 scaled to ±1?

# %%
from finetune_lab.methods.codebooks import nearest

# BEGIN SOLUTION
guess = 6
# END SOLUTION
normal = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
x = normal.view(-1, 64)
chosen = nearest(x / x.abs().amax(1, keepdim=True), NF4)
share = torch.bincount(chosen.flatten().long(), minlength=16) / chosen.numel()
predict.number("04-p1", guess, 100 * share.min(), unit="%")
print("share of each level, %:", " ".join(f"{100 * s:.1f}" for s in share))
print(f"entropy {-(share * share.log2()).sum():.2f} bits of 4")

# %% [markdown]
# Dividing by the block's maximum bends the bell, and the bins are equal no more. Nor is NF4 the code of least error
# (arXiv 2306.06965). Here are mean square errors, relative to the variance, in blocks of 64; heavy tails are Student's t.
# *Lloyd-Max* moves the inner levels to the best place for these normal values; INT4 with a *zero point* spreads 16 even
# steps from each block's smallest weight to its largest, and stores both.

# %%
from finetune_lab.course.codebook_plot import samples
from finetune_lab.methods import codebooks

scaled = (x / x.abs().amax(1, keepdim=True)).flatten()
best = codebooks.lloyd_max(scaled, NF4, steps=60)
codes = {"NF4": NF4, "notes' formula": middles, "Lloyd-Max": best,
         "INT4": codebooks.int_code(4), "FP4": codebooks.fp4_code()}  # fmt: skip
trips = {n: lambda w, code=code: codebooks.round_trip(w, code, 64) for n, code in codes.items()}
trips["INT4, zero point"] = lambda w: codebooks.affine_round_trip(w, 4, 64)
data = {"normal": normal, "uniform": samples("uniform"), "heavy": samples("heavy tails"), "model": z}
print(f"{'':16}", *(f"{name:>9}" for name in data))
for name, trip in trips.items():
    errors = [((trip(w) - w).square().mean() / w.var()).item() for w in data.values()]
    print(f"{name:16}", *(f"{error:9.5f}" for error in errors))

# %% [markdown]
# Read the columns. On normal weights NF4 beats INT4 and FP4, and loses to Lloyd-Max, and a little even to integers with a
# zero point, at the price of a second number a block. On uniform weights even steps win. The notes' formula errs about as
# much as NF4, but cannot store a zero. NF4 is a good code, not "information-theoretically optimal".
#
# ## Outliers and block size
# One outlier stretches the scale for everything that shares it. So share it with few: QLoRA takes *blocks* of 64 weights,
# each with its own largest magnitude, absmax: $\hat w = \text{absmax} \cdot q_i$.
# ### Exercise 4.2 · Quantise in blocks and restore (10 minutes)
# `blocks(w, blocksize)` gives the weight as rows of blocks, the last one filled with zeros; `nearest(x, code)` gives indices.
# Clamp the divisor at 1e-38: a block may be all zeros.

# %%
from finetune_lab.methods.codebooks import blocks


def round_trip(w: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """w of any shape -> the weight that its codes stand for: same shape, fp32."""
    # BEGIN SOLUTION
    x = blocks(w, blocksize)
    absmax = x.abs().amax(1, keepdim=True)
    restored = code[nearest(x / absmax.clamp(min=1e-38), code).long()] * absmax
    return restored.flatten()[: w.numel()].view(w.shape)
    # END SOLUTION


round_trip = check.round_trip(round_trip)

# %% [markdown]
# A public note computes one absmax for the whole tensor. One weight of 100 standard deviations among 262,144: predict the
# error of that, in percent of the weights' spread (root mean square; blocks of 64 give 9 %).

# %%
# BEGIN SOLUTION
guess = 20
# END SOLUTION
spoiled = normal.clone()
spoiled[1000] = 100


def error(w: Tensor, blocksize: int) -> float:
    """Root mean square error in percent of the weights' spread, the outlier left out."""
    off = (round_trip(w, NF4, blocksize) - w)[torch.arange(len(w)) != 1000]
    return 100 * (off.square().mean().sqrt() / normal.std()).item()


predict.number("04-p2", guess, error(spoiled, len(spoiled)), unit="%")
for name, w in {"normal": normal, "one outlier": spoiled}.items():
    one, many = error(w, len(w)), error(w, 64)
    print(f"{name:12} one scale {one:5.1f} %   blocks of 64 {many:5.1f} %")

# %% [markdown]
# Every other weight became zero. Smaller blocks are safer, and cost: each absmax is 32 bits, shared by `blocksize` weights.

# %%
sizes, curves = [32, 64, 128, 256, 1024, 4096], {}
for name, some in {"as it came": base, "with outliers": model}.items():
    flat = torch.cat([(w / w.std()).flatten() for w in weights(some)])[: 2**22]
    typical = flat.abs() < 4  # the error of the many, not of the few large ones
    errors = [(round_trip(flat, NF4, size) - flat)[typical] for size in sizes]
    curves[name] = [100 * off.square().mean().sqrt().item() for off in errors]
    print(f"{name:14}", " ".join(f"{k}: {e:.1f} %" for k, e in zip(sizes, curves[name], strict=True)))
figure = plots.line([4 + 32 / size for size in sizes], curves, "Bits for scales buy accuracy",
                    "bits a weight (right: blocks of 32)", "error (rms, % of spread)")  # fmt: skip
told = [f"{name} {e[-1]:.1f} % in blocks of 4096, {e[1]:.1f} % in 64" for name, e in curves.items()]
plots.show(figure, alt=f"Error against bits a weight: {'; '.join(told)}.")

# %% [markdown]
# Now play: fewer bits, larger blocks, other distributions. Triangles are NormalFloat levels, bars are integers.

# %%
from ipywidgets import Dropdown, IntSlider, SelectionSlider

from finetune_lab.course.codebook_plot import DISTRIBUTIONS, codebook_plot
from finetune_lab.course.explorer import Explorer

Explorer(codebook_plot, alt="Histogram of scaled weights over the levels of two codes.",
         bits=IntSlider(4, 2, 8), distribution=Dropdown(options=DISTRIBUTIONS),
         block=SelectionSlider(options=[16, 32, 64, 256, 1024, 4096], value=64))  # fmt: skip

# %% [markdown]
# ## Two codes in a byte
# `argmin` over 16 distances, as notes do it, gives int64 indices: 8 *bytes* each, and a temporary of 16 times the weight. No
# memory is saved until two codes share a byte.
# ### Exercise 4.3 · Pack (5 minutes)


# %%
def pack(codes: Tensor) -> Tensor:
    """(n,) uint8 below 16, n even -> (n / 2,) uint8.

    Two neighbours share a byte: the first takes the high four bits.
    """
    # BEGIN SOLUTION
    return codes[::2] << 4 | codes[1::2]
    # END SOLUTION


pack = check.pack(pack)
indices = (scaled[:, None] - NF4).abs().argmin(1)
packed = pack(indices.to(torch.uint8))
for name, tensor in {"fp32": scaled, "argmin": indices, "packed": packed}.items():
    print(f"{len(scaled):,} weights as {name:7} {tensor.nbytes:10,} bytes")

# %% [markdown]
# ### Exercise 4.4 · From bytes to weights (10 minutes)
# Unpack, look the levels up, multiply each block by its absmax, cut the padding off. `unpack` undoes `pack`.

# %%
from finetune_lab.methods.nf4 import unpack


def simple_dequantize(packed: Tensor, absmax: Tensor, code: Tensor, shape: torch.Size, blocksize: int = 64) -> Tensor:
    """packed (ceil(n / 2),) uint8, absmax (blocks,) fp32 -> the weight, fp32, in `shape`."""
    # BEGIN SOLUTION
    values = code[unpack(packed).long()][: shape.numel()]
    return (blocks(values, blocksize) * absmax[:, None]).flatten()[: shape.numel()].view(shape)
    # END SOLUTION


simple_dequantize = check.simple_dequantize(simple_dequantize)
back = simple_dequantize(packed, x.abs().amax(1), NF4, normal.shape)
off = (back - normal).square().mean().sqrt()
print(f"error after packing and unpacking: {100 * off:.1f} % of the spread")

# %% [markdown]
# ## Double quantization
# One fp32 scale for 64 weights is half a bit a weight. So quantise the scales too: 8 bits each, 256 of them share one fp32
# number. Scales are positive, so their mean is taken off first. And the 8 bits are no integers: the *dynamic* code has
# steps that grow with the value, like a float.
# ### Exercise 4.5 · Quantise the scales (5 minutes)
# `quantize_blockwise(x, blocksize=...)` returns (codes, absmax of its blocks) for values of both signs.

# %%
from finetune_lab.methods.blockwise import Scales, quantize_blockwise
from finetune_lab.methods.codebooks import dynamic_code


def double_quantize(absmax: Tensor, blocksize: int = 256) -> Scales:
    """absmax (blocks,) fp32 -> Scales(codes, absmax of the absmax, offset, blocksize)."""
    # BEGIN SOLUTION
    offset = absmax.mean()
    codes, second = quantize_blockwise(absmax - offset, blocksize=blocksize)
    return Scales(codes, second, offset, blocksize)
    # END SOLUTION


double_quantize = check.double_quantize(double_quantize)
steps = dynamic_code().diff()
print(f"steps from {steps.min():.1e} to {steps.max():.1e}; in INT8 all are {2 / 254:.1e}")

# %% [markdown]
# Notes say that this saves "about 0.4 GB on a 7B model" (6.74 billion weights). Predict the number from your formula.

# %%
from finetune_lab.methods.nf4 import bits_per_parameter, quantize

# BEGIN SOLUTION
guess = 0.4
# END SOLUTION
single, double = (quantize(torch.randn(1024, 1024), double_quant=d) for d in (False, True))
bits = [bits_per_parameter(q) for q in (single, double)]  # counted from the stored bytes
predict.number("04-p3", guess, (bits[0] - bits[1]) * 6.74e9 / 8 / 1e9, unit="GB")
print(f"bits a weight: {bits[0]:.3f}, with double quantization {bits[1]:.3f}")
print(f"by hand: {4 + 8 / 64 + 32 / (64 * 256):.3f}")

# %% [markdown]
# ## The problem, healed
# The same model, with the same outliers, in NF4 with double quantization. The package's `quantize` does what you wrote, at
# speed.

# %%
from finetune_lab.methods.nf4 import dequantize

in_nf4 = with_weights(model, lambda w: dequantize(quantize(w, double_quant=True)))
healed = report(in_nf4, "NF4, blocks of 64")
print(f"story perplexity: {ruined:,.2f} naively, {healed:,.2f} in NF4\n")
stored = [quantize(w, double_quant=True) for w in weights(model)]
linear = sum(q.nbytes for q in stored)
rest = 2 * (base.num_parameters() - COUNT)  # embeddings, head and norms stay in 16 bits
print(f"linear layers {4 * COUNT / 1e6:,.2f} MB in fp32, {linear / 1e6:,.2f} MB in NF4")
print(f"that is {8 * linear / COUNT:.3f} bits a weight; with the rest {(linear + rest) / 1e6:,.2f} MB")
print(f"'half a byte a parameter' would be {base.num_parameters() / 2e6:,.2f} MB")

# %% [markdown]
# "Half a byte a parameter" forgets the scales and everything that stays in 16 bits: of Llama-3-8B, 1.05 billion embedding
# and head parameters, 2.1 GB. Small models suffer most.
#
# Other formats, on the tiny model with its outliers: five draws of questions, recorded by `finetune-lab bench qlora`.

# %%
recorded = {row["name"]: row for row in bench.recorded("qlora")["rows"]}


def quoted(name: str, side: str = "value") -> tuple[float, float]:
    """(mean, standard deviation) of a recorded figure, or of its peer's ("peer_value")."""
    return recorded[name][side], recorded[f"{name}, standard deviation"][side]


KNOWN = ("facts", "sums", "story perplexity")
print(f"{'':26} facts    sums   story perplexity")
for name in dict.fromkeys(name.split(":")[0] for name in recorded if name.startswith("base with")):
    facts, sums, story = (quoted(f"{name}: {what}")[0] for what in KNOWN)
    print(f"{name[20:]:24} {100 * facts:5.0f} % {100 * sums:5.0f} %   {story:9.3f}")
print(f"{'fp32':40}   {quoted(f'{name}: {KNOWN[2]}', 'peer_value')[0]:9.3f}\n")
for row in bench.recorded("nf4")["rows"]:
    if row["name"].startswith("smollm2") and row["name"].endswith("64: story perplexity"):
        print(f"{row['name'][:-18]:46} {row['value']:6.2f}, fp32 {row['peer_value']:.2f}")

# %% [markdown]
# On the toy, blocks carry every 4-bit format over its outliers; without outliers even one scale a tensor hardly hurts it. On
# SmolLM2-135M (the last lines, from the bench `nf4`) the code book matters: the notes' symmetric quantiles err *less* than
# NF4 in the square, and cost more perplexity. They have no zero, a likely reason. (These weights were once stored in even
# steps with a zero point, which flatters that format.)
#
# ## Gradients pass through
# A code has no derivative, and needs none: the weight is frozen. Yet the layers below need *their* gradient, and it goes
# through the restored weight: $\partial L/\partial x = \partial L/\partial y \cdot \hat W$. Autograd would keep $\hat W$ in
# full precision for that, in every layer. So we keep the packed bytes and restore a second time.
# ### Exercise 4.6 · Gradients through a 4-bit weight (10 minutes)
# `ctx.needs_input_grad` says for x, q and bias whether a gradient is wanted. The bias was added to every row.

# %%
from finetune_lab.methods.nf4 import Quantized


class NF4Function(torch.autograd.Function):
    """x (..., in) @ dequantize(q) (out, in)^T + bias. Keeps the packed weight only."""

    @staticmethod
    def forward(ctx, x: Tensor, q: Quantized, bias: Tensor | None) -> Tensor:
        ctx.q = q
        return F.linear(x, dequantize(q).to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y: Tensor):
        # BEGIN SOLUTION
        wants_x, _, wants_bias = ctx.needs_input_grad
        grad_x = grad_y @ dequantize(ctx.q).to(grad_y.dtype) if wants_x else None
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if wants_bias else None
        return grad_x, None, grad_bias
        # END SOLUTION


NF4Function = check.NF4Function(NF4Function)
q, rows = stored[0], torch.randn(5, stored[0].shape[1])
grads = []
for forward in (lambda x: NF4Function.apply(x, q, None), lambda x: x @ dequantize(q).T):
    leaf = rows.clone().requires_grad_()
    forward(leaf).square().sum().backward()
    grads.append(leaf.grad)
print(f"largest difference to a dense layer's gradient: {(grads[0] - grads[1]).abs().max():.0e}")
print(f"kept for backward: {q.nbytes:,} bytes instead of {4 * q.shape.numel():,}")

# %% [markdown]
# ## QLoRA is NF4Linear plus LoRA
# `NF4Linear` wraps your function; `quantize_linears` puts it into a model; lesson 03's `inject` adds adapters, in fp32 (never
# 4-bit). The task is arithmetic in a chat; the base model knows sums but not how to answer.

# %%
from finetune_lab.methods.qlora import quantize_linears

recipe = tier.recipes["math"]
STEPS = max(20, recipe.steps // 5)
lessons = tier.items("math", "train", recipe.items)
exam = tier.items("math", "test", N)


def right(some_model: nn.Module) -> float:
    """Percent of the held-out questions with the right answer."""
    asked = [item["prompt"] for item in exam]
    said = generate.answer(some_model, tokenizer, asked, max_new_tokens=8)
    return 100 * tasks.score("math", said, exam)["exact_match"]


def tuned(some_base: nn.Module, on_step=None) -> nn.Module:
    """`some_base` with LoRA on all linear layers, trained."""
    torch.manual_seed(0)
    inject(some_base, r=recipe.rank, alpha=2 * recipe.rank)
    train.sft(some_base, tokenizer, lessons, steps=STEPS, batch_size=recipe.batch_size,
              lr=recipe.lora_lr, on_step=on_step)  # fmt: skip
    return some_base


with plots.LiveCurve("QLoRA learns through 4-bit weights", alt="Training loss.") as curve:
    qlora = tuned(quantize_linears(load()[0]), curve)

# %%
lora = tuned(load()[0])
layers = active_layers(qlora)
adapters = sum(p.numel() for p in qlora.parameters() if p.requires_grad)
frozen = sum(layer.base.quantized.nbytes for layer in layers.values())
for name, some in {"before": base, "LoRA": lora, "QLoRA": qlora}.items():
    print(f"{name:6} {right(some):3.0f} % right")
for name, size in {"fp32": 4 * COUNT, "bf16": 2 * COUNT, "NF4": frozen}.items():
    print(f"frozen linear weights in {name}: {size / 1e6:.2f} MB")
print(f"adapters, gradients, AdamW: {16 * adapters / 1e6:.2f} MB in {layers[LINEAR[0]].A.dtype}")
del lora

# %% [markdown]
# One seed is an anecdote. Five, on two tasks, recorded by the same bench; "apart" means that mean ± standard deviation
# do not overlap.


# %%
def compare(prefix: str, *metrics: str) -> None:
    """Print recorded figures beside those of the peer."""
    for metric in metrics:
        name = f"{prefix}: {metric}"
        (a, da), (b, db) = quoted(name), quoted(name, "peer_value")
        verdict = "apart" if abs(a - b) > da + db else "no claim"
        peer = recorded[name]["peer"]
        print(f"{name:50} {a:8.3g} ± {da:6.2g}   {peer} {b:8.3g} ± {db:6.2g}   {verdict}")


for setting in ("math", "extract"):
    compare(f"{setting}, QLoRA", "exact match", "held-out answer loss", "training loss",
            "weight bytes", "CPU seconds")  # fmt: skip

# %% [markdown]
# The base is eight times smaller, and no difference in learning shows. (The paper found the same on large models.) What is
# apart is the time.
#
# ## What QLoRA costs in time
# Each pass restores each weight: a cost for each *weight*, however many tokens the batch has. The matrix product costs for
# each weight *and* token. So the extra time fades with the batch. One layer, forward and backward, against `nn.Linear`:

# %%
from finetune_lab.lab.meter import interleaved_seconds, median_ratio
from finetune_lab.methods.nf4_linear import NF4Linear

dense = nn.Linear(1024, 1024, bias=False).requires_grad_(False)
four = NF4Linear.from_linear(dense)
for tokens in (1, 16, 256, 1024):
    leaf = torch.randn(tokens, 1024, requires_grad=True)
    seconds = interleaved_seconds({
        "fp32": lambda leaf=leaf: dense(leaf).sum().backward(),
        "NF4": lambda leaf=leaf: four(leaf).sum().backward(),
    }, rounds=7)  # fmt: skip
    print(f"{tokens:5} tokens: {median_ratio(seconds, 'NF4', 'fp32'):4.1f} times as long in NF4")

# %% [markdown]
# So answer one token at a time from a merged model, not from a training layer. "20 to 30 % slower", as notes say, is some
# kernel at some batch: measure yours. The memory that 4 bits free can buy a *larger* batch; then activations are the limit.
#
# ## Compute dtype
# 4 bits is how weights are stored; the product runs in a *compute dtype*. Notes: "it must be bf16". Here are bf16 and fp16
# against fp32 products, five seeds, after only ten steps. Then one layer: each dtype's own error beside the 4 bits'.

# %%
for dtype in ("bf16", "fp16"):
    compare(f"math, compute in {dtype}", "training loss", "held-out answer loss")
layer = base.get_submodule(LINEAR[0])
leaf = torch.randn(64, layer.in_features)
weight, restored = layer.weight.detach(), NF4Linear.from_linear(layer).dequantize()
exact, rounded = leaf @ weight.T, leaf @ restored.T
print(f"error of the 4 bits {100 * (rounded - exact).norm() / exact.norm():.1f} %")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    off = ((leaf.to(dtype) @ restored.to(dtype).T).float() - rounded).norm() / exact.norm()
    print(f"{dtype}: error {100 * off:.3f} %; 70,000 becomes {torch.tensor(7e4).to(dtype).item():,.0f}")

# %% [markdown]
# In these short runs no dtype matters: its error is small beside the rounding of the weights. The last column is the reason
# for bf16: fp16 ends at 65,504, so it needs loss scaling, and works with it on cards without bf16 (T4, V100).
#
# ## Merge traps
# To serve the model you want one weight again. Which? The adapter learnt beside the *restored* weight, its rounding error
# included.
# ### Exercise 4.7 · Merge a QLoRA adapter (10 minutes)


# %%
from finetune_lab.methods.lora import LoRALinear


def merge_dequantized(layer: LoRALinear) -> nn.Linear:
    """A plain, frozen layer that acts like layer.base (NF4Linear) plus its adapter.

    layer.base.dequantize() restores the weight, layer.scaling is alpha / r; the bias is kept.
    """
    # BEGIN SOLUTION
    weight = layer.base.dequantize() + layer.scaling * layer.B @ layer.A
    bias = layer.base.bias
    merged = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    merged.weight = nn.Parameter(weight.detach(), requires_grad=False)
    merged.bias = bias
    return merged
    # END SOLUTION


merge_dequantized = check.merge_dequantized(merge_dequantized)

# %% [markdown]
# Now the tempting way: keep the model in 4 bits. Restore, add, round to NF4 again, as merging into a 4-bit layer does (peft
# warns of "rounding errors"). Predict: how many percent of the answers are right after that?

# %%
from finetune_lab.methods.qlora import merge_in_4bit, replace_adapters


def merged_by(route) -> nn.Module:
    """A copy of the QLoRA model with route(path, layer) where its adapters stood."""
    return replace_adapters(copy.deepcopy(qlora), route)


# BEGIN SOLUTION
guess = 60
# END SOLUTION
print(f"with the adapter {right(qlora):.0f} %")
good = merged_by(lambda path, layer: merge_dequantized(layer))
print(f"merged into the restored weight {right(good):.0f} %")
bad = merged_by(lambda path, layer: merge_in_4bit(layer))
predict.number("04-p4", guess, right(bad), unit="%")

# %% [markdown]
# Why so bad, when the same rounding did the base no harm? Look at one layer.

# %%
from finetune_lab.methods.nf4 import simple_quantize

last = layers[LINEAR[-1]]
update, original, grid = last.delta().detach(), weights(base)[-1], last.base.dequantize()
print(f"size of the update {100 * update.norm() / grid.norm():.1f} % of the weight")
for name, start in {"restored weight": grid, "original weight": original}.items():
    packed_before, packed_after = (simple_quantize(w, NF4)[0] for w in (start, start + update))
    same = (unpack(packed_before) == unpack(packed_after)).float().mean()
    moved = round_trip(start + update, NF4, 64) - round_trip(start, NF4, 64)
    share = (moved * update).sum() / update.square().sum()
    print(f"{name}: {100 * same:.1f} % of the codes stay, {100 * share:.0f} % of the update survives")

# %% [markdown]
# It is not noise. The restored weights lie *exactly on levels*, and an update smaller than half a step rounds back to the
# level it came from. Original weights lie anywhere between levels: there the same update tips a few of them over, and on
# average survives. Five seeds of every route:

# %%
ROUTES = ["dequantised base", "original base", "in 4 bit", "original base, then NF4",
          "dequantised base, then FP4", "dequantised base, then INT4",
          "dequantised base, then INT8"]  # fmt: skip
for setting, routes in {"math": ROUTES, "extract": ROUTES[:4]}.items():
    update, sd = quoted(f"{setting}, adapter: update relative to the weights")
    print(f"{setting}: update {100 * update:.1f} ± {100 * sd:.1f} % of the weights")
    for route in routes:
        compare(f"{setting}, merged {route}", "exact match")
means, spreads = {}, {}
for route in ROUTES[:4]:
    label = route.replace(", ", ",\n").replace(" base", "\nbase")
    mean, sd = quoted(f"math, merged {route}: exact match")
    means[label], spreads[label] = 100 * mean, 100 * sd
figure = plots.bars(means, "Merging in 4 bits loses the adapter", "right (%), five seeds", spreads)
told = [f"{' '.join(label.split())} {means[label]:.0f} ± {spreads[label]:.0f} %" for label in means]
plots.show(figure, alt=f"Right answers after merging: {'; '.join(told)}.")

# %% [markdown]
# Other grids than the old one behave like any rounding: FP4 and INT8 cost nothing that shows here, INT4 a part. At
# `extract` the update is nearer to half a step, and more of it survives.
#
# What a toy hides: large models get much smaller updates, and merging onto the *original* base, harmless here, costs there.
# On SmolLM2-135M, in one earlier run that no cell repeats, eight steps moved the weights by 0.7 %: loss 0.68 unmerged and into the restored base, 0.90 onto the
# original base, 3.60 in 4 bits, where the untuned model has 3.76. So: merge into the restored base in 16 or 32 bits, test,
# then quantise for serving from that file, and test again.
#
# ## 8-bit AdamW
# Adam's two moments are 8 bytes for each trained number. In blocks of 256 with the dynamic code they are 2 (arXiv 2110.02861).
# Tensors under 4,096 numbers stay in fp32. A regression, both optimizers:

# %%
from finetune_lab.methods.adam8bit import AdamW8bit


def fit(optimizer_class) -> tuple[float, torch.optim.Optimizer]:
    """Loss after 200 steps of one linear layer on a task it can solve."""
    torch.manual_seed(0)
    student, inputs = nn.Linear(128, 64, bias=False), torch.randn(256, 128)
    targets = inputs @ torch.randn(128, 64)
    optimizer = optimizer_class(student.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(student(inputs), targets)
        loss.backward()
        optimizer.step()
    return loss.item(), optimizer


plain, optimizer = fit(torch.optim.AdamW)
moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
small, optimizer = fit(AdamW8bit)
print(f"AdamW: loss {plain:.4f}, {moments:,} bytes")
print(f"in 8 bits: loss {small:.4f}, {optimizer.state_bytes():,} bytes")
print(f"42M adapter numbers (8B model): {8 * 42e6 / 1e9:.2f} GB of moments become {2 * 42e6 / 1e9:.2f} GB")

# %% [markdown]
# With adapters there is little to save: it pays where everything is trained.
#
# ## Paged optimizers
# One long sample can need more than is free, once. Paged states move to the host for that step and come back: page *faults*
# instead of out-of-memory. A 24 GB card, 20 GB fixed, 2 GB of states, 1 MB a token:

# %%
from finetune_lab.methods.paging import simulate

card = {"capacity": 24 * 10**9, "fixed": 20 * 10**9, "state": 2 * 10**9, "bytes_per_token": 10**6}
for step in simulate([1000, 1000, 3500, 1000], **card):
    verdict = "fits" if step.fits else "out of memory without pages"
    moved = step.moved / 1e9
    print(f"{step.length:5} tokens: {step.faults:4} faults, {moved:4.1f} GB moved; {verdict}")

# %% [markdown]
# It saves the run from a rare spike. Paging at every step would be slow, and weights and activations are not paged.
#
# ## The same with the library people use
# transformers + bitsandbytes + peft. **Spell the configuration out**: the default 4 bits are FP4, without double
# quantization, in fp32.

# %%
import warnings

import bitsandbytes
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from finetune_lab.lab.bnb_faults import make_safe
from finetune_lab.lab.models import chosen, locate

transformers_logging.disable_progress_bar()
warnings.simplefilter("ignore")  # peft and bitsandbytes use names that transformers 5 renamed
d = BitsAndBytesConfig(load_in_4bit=True)
print("default:", d.bnb_4bit_quant_type, d.bnb_4bit_use_double_quant, d.bnb_4bit_compute_dtype)
settings = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,  # the line that changes on a GPU: torch.bfloat16
)
theirs = AutoModelForCausalLM.from_pretrained(locate(chosen()), quantization_config=settings, dtype=torch.float32)
theirs = make_safe(theirs)  # on CPUs, before the first forward pass: see the faults below

# %%
ours = quantize_linears(load()[0])
same = {"bytes": [], "weights": []}
for path in LINEAR:
    weight, mine = theirs.get_submodule(path).weight, ours.get_submodule(path)
    same["bytes"].append(torch.equal(weight.data.flatten(), mine.packed))
    restored = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    same["weights"].append(torch.equal(restored, mine.dequantize()))
for name, flags in same.items():
    print(f"{name:8} {sum(flags)} of {len(flags)} layers equal to the bit")
table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
print("NF4 table equal to yours:", torch.equal(table, NF4))

# %% [markdown]
# Preparing freezes everything, casts what is *not* quantised to fp32 (not bf16), and turns activation checkpointing on. Then
# LoRA as always. The same steps, with the same batches, beside ours:

# %%
prepared = train.add_lora(prepare_model_for_kbit_training(theirs), recipe.rank, seed=0)
mine = inject(ours, r=recipe.rank, alpha=2 * recipe.rank)
for path, layer in active_layers(mine).items():
    twin = prepared.get_submodule(f"base_model.model.{path}")
    layer.A.data.copy_(twin.lora_A["default"].weight.data)
budget = {"steps": 5, "batch_size": recipe.batch_size, "lr": recipe.lora_lr}
for name, some in {"bitsandbytes": prepared, "ours": mine}.items():
    history = train.sft(some, tokenizer, lessons, **budget)
    print(f"{name:12}", " ".join(f"{row['loss']:.5f}" for row in history))

# %% [markdown]
# On a GPU, add `device_map="auto"` and set the compute dtype to bf16; the rest stays. For several GPUs with FSDP set
# `bnb_4bit_quant_storage=torch.bfloat16` too: it works since 2024 (release 0.43 of bitsandbytes).
#
# ## Three faults of bitsandbytes on CPUs
# Measured on version 0.50.2; which of them shows depends on the processor. All are silent or strange, and each has a test.

# %%
from finetune_lab.lab import bnb_faults


def bnb_layer(fan_in: int, fan_out: int) -> nn.Module:
    """A bitsandbytes layer whose columns differ in scale, as in real weights."""
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(fan_in, fan_out, bias=False, quant_type="nf4")
    layer.compute_dtype = torch.float32
    weight = torch.randn(fan_out, fan_in) * torch.rand(fan_in).exp()
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


print("1.", bnb_faults.wrong_rows(torch.randn(64, 96) * torch.logspace(0, 1, 96)))
victim = bnb_layer(128, 64)
with torch.no_grad():
    victim.eval()(torch.randn(2, 128))  # one evaluation
print("2.", bnb_faults.repacked(victim), bnb_faults.severed(victim))
print("3.", bnb_faults.eval_error(bnb_layer(128, 24)))

# %% [markdown]
# "None" means that this processor is spared. Otherwise: row lengths must be multiples of the block, and `make_safe` must run
# before the first forward pass. A train, evaluate, train loop is enough to lose gradients.
#
# ## What else there is
# - **IR-QLoRA** (arXiv 2402.05445) shifts each block to keep more information in 4 bits, and adds parameter-free paths to the
#   adapter; it reports 1.4 % more on MMLU. Not measured here.
# - **QDoRA** is DoRA on a 4-bit base: `inject(..., layer=DoRALinear)` on `NF4Linear`. Its norm needs the restored weight at
#   every step: more time.
# - **Serving** in INT8 or INT4 (GPTQ, AWQ, GGUF) is another matter: no training follows that could make up for the error. The
#   routes above that end in INT8 are the simplest form. Evaluate again after it.
#
# ## Myths
#
# | you may read | what is true | shown in |
# |---|---|---|
# | NF4 is $\Phi^{-1}((2i+1)/32)$ | symmetric, without a zero; levels off by up to 0.04 | why quantiles |
# | each level holds 1/16 of the weights | 1.7 to 9.3 % in blocks of 64 | why quantiles |
# | information-theoretically optimal | not the least error (2306.06965) | why quantiles |
# | one absmax for a tensor | one for 64 weights | outliers and block size |
# | argmin gives 4-bit indices | int64 until packed | two codes in a byte |
# | double quantization is INT8 | dynamic, float-like code, mean removed | double quantization |
# | it saves 0.4 GB on 7B | 0.31 GB | double quantization |
# | a novel high-precision technique | three plain parts: NF4, double quantization, paged optimizers | paged optimizers |
# | memory is half a byte a parameter | scales, embeddings, head, norms, adapters, activations | the problem, healed |
# | 65B on 24 GB | 65 × 4.127 / 8 = 33.5 GB of weights alone: 48 GB; 33B fits 24 | double quantization |
# | adapters are 4-bit, or fp16 | fp32 by default; bf16 in the paper | QLoRA is NF4Linear plus LoRA |
# | compute dtype must be bf16 | advice, not a law; the default is fp32 | compute dtype |
# | use small batches with QLoRA | freed memory allows larger ones | what QLoRA costs in time |
# | 20 to 30 % slower; 2 to 5 times faster with X | depends on kernel and batch: measure | what QLoRA costs in time |
# | merge: restore, add, quantise again | loses the adapter | merge traps |
# | just `merge_and_unload()` | in 4 bits by default: same trap | merge traps |
# | not with FSDP, ZeRO-2 only | since 2024, with a matching storage dtype; no cell, it needs GPUs | – |
#
# ## What breaks in practice
#
# | symptom | test | fix |
# |---|---|---|
# | worse and slower than the paper | print `bnb_4bit_quant_type`, `bnb_4bit_compute_dtype` | spell the configuration out |
# | tuned model acts untuned after merging | compare logits with and without merge | merge into the restored base |
# | worse after merging | was the base loaded in 16 bits for the merge? | same quantised base, restored |
# | trains worse after an evaluation (CPU) | `bnb_faults.repacked(layer)` | `make_safe(model)` first |
# | garbage from rows of 80, 96, ... (CPU) | `bnb_faults.wrong_rows(weight)` | multiples of the block |
# | memory hardly falls | count what is not quantised | a head and embeddings stay 16 bit |
# | out of memory at one long sample | longest row of the data | paged optimizer, shorter rows |
# | nan in fp16 | activations above 65,504? | bf16, or loss scaling |
#
# ## Summary
# A block's largest weight, sixteen quantiles, two codes a byte, scales in 8 bits: 4.127 bits. Gradients pass through the
# restored weight and never into it. Merge where the adapter learnt: into the restored base.
#
# References: QLoRA 2305.14314; not optimal 2306.06965; 8-bit optimizers 2110.02861; IR-QLoRA 2402.05445; DoRA 2402.09353;
# SmoothQuant 2211.10438. Threads: peft #2321, bitsandbytes #1311.
#
# Where next: lesson 05 puts TRL's trainer on top; lesson 07 merges whole models.
# Drills: `finetune-lab drill --lesson 04`.
