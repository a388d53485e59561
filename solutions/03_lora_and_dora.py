# ---
# jupyter:
#   finetune_lab:
#     title: LoRA and DoRA
#     minutes: 110
#     needs: lesson 01
#     budget: lesson
# ---

# %% [markdown]
# # 03 · LoRA and DoRA
# **A fine-tune changes large matrices a little: here you write that change as two thin ones, and measure what it can do.**
#
# Minutes: 110. You need: lesson 01, matrix products and gradients in PyTorch. No GPU.
#
# You will be able to:
# - write LoRA, rsLoRA, LoRA+ and DoRA, equal to peft's;
# - choose rank, alpha, learning rate and layers, and say which of them matters;
# - merge, switch, save and load adapters, and say what rounding costs;
# - find intruder dimensions, and tell forgetting from folklore.

# %%
import math
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune_lab.course import bench, check, plots, predict
from finetune_lab.lab import generate, tasks, tiers, train
from finetune_lab.lab.models import load
from finetune_lab.methods import dora, inject, lora, spectrum
from finetune_lab.methods.trainable import trainable_report

tier = tiers.tier()
base, tokenizer = load(seed=0)
recipe, rank = tier.recipes["answer"], tier.recipes["answer"].rank
paths = inject.find_targets(base, "all-linear")
paths = paths[:: -(-len(paths) // 35)]  # at most 35 matrices are looked into
print(f"{tier.name} model, {sum(p.numel() for p in base.parameters()):,} parameters; matrices: {len(paths)}")

# %% [markdown]
# ## The problem in one number
# The base model knows the towns of its world, but not how to answer a question: 0 % of its answers are right. First the
# plain way: train every weight.

# %%
data = {task: (tier.items(task, "train", 500), tier.items(task, "test", min(tier.test_items, 100)))
        for task in ("answer", "extract")}  # fmt: skip


def right(model, task: str = "answer") -> float:
    """Percent of the held-out items that the model answers exactly."""
    items = data[task][1]
    said = generate.answer(model, tokenizer, [item["prompt"] for item in items], max_new_tokens=40)
    return 100 * tasks.score(task, said, items)["exact_match"]


def weights(model) -> dict[str, Tensor]:
    """The weights (out, in) that the model acts with now, adapters included."""
    modules = {path: model.get_submodule(path) for path in paths}
    acting = {p: m.weight if isinstance(m, lora.LoRALinear) else lora.dense_weight(m) for p, m in modules.items()}
    return {path: weight.detach().float().cpu().clone() for path, weight in acting.items()}


# %%
W0 = weights(base)
trails: dict[str, list] = {}  # name -> (change of the rows' length, turn of the rows), matrix by matrix, four times


def tuned(name: str, layer=None, lr: float = recipe.lora_lr, task: str = "answer"):
    """A fresh base after training, fully or with adapters of class `layer`."""
    steps = min(recipe.steps, 40)
    model, trails[name] = load(seed=0)[0], []
    if layer is not None:
        inject.inject(model, r=rank, alpha=2 * rank, layer=layer)

    def look(step: int, loss: float) -> None:
        if (step + 1) % (steps // 4) == 0:
            pairs = [spectrum.magnitude_and_direction_change(W0[p], w) for p, w in weights(model).items()]
            trails[name].extend(pairs)

    train.sft(model, tokenizer, data[task][0], steps=steps, batch_size=recipe.batch_size, lr=lr, on_step=look)
    count = trainable_report(model)["trainable"]
    print(f"{name}: {right(model, task):.0f} % right; {count:,} numbers trained and to keep, {4e-6 * count:.1f} MB; "
          f"with gradients and AdamW {16e-6 * count:.1f} MB")  # fmt: skip
    return model


print(f"base: {right(base):.0f} % right")
full = weights(tuned("full fine-tuning", lr=2 * recipe.full_lr))

# %% [markdown]
# It works, and the bill is a whole model: for every task, on disk, and four times that in memory while it trains. Ten tasks,
# ten models. The same number will be healed below by an adapter that is a fraction of it.
#
# ## What a full fine-tune changes
# Look at the *update* $\Delta W = W - W_0$ of each matrix, through its singular values: the strengths of its independent
# directions. The tiny model's matrices have 128 to 192 directions. How many of them hold 90 % of the update's squared norm,
# on average?

# %%
updates = {path: w - W0[path] for path, w in full.items()}
directions = sum(min(u.shape) for u in updates.values()) / len(updates)
needed = sum(spectrum.energy_rank(u) for u in updates.values()) / len(updates)
# BEGIN SOLUTION
guess = 90
# END SOLUTION
predict.number("03-p1", guess, actual=needed, unit=f"of {directions:.0f}")


# %%
def mean_curve(matrices) -> list[float]:
    """The mean share of energy, in percent, that the strongest 1, 2, ... directions hold."""
    curves = [100 * spectrum.energy(matrix) for matrix in matrices]
    width = min(map(len, curves))
    return torch.stack([curve[:width] for curve in curves]).mean(0).tolist()


learned, noise = mean_curve(updates.values()), mean_curve(torch.randn_like(u) for u in updates.values())
title, curves = "A few directions hold most of what was learnt", {"full update": learned, "random matrix": noise}
xs = list(range(1, len(learned) + 1))
figure = plots.line(xs, curves, title, "strongest directions", "share of the energy (%)")
figure.set_size_inches(5.4, 2.7)
plots.show(figure, alt=f"The first 4 directions of the update hold {learned[3]:.0f} % of its energy, the first 16 hold "
           f"{learned[15]:.0f} %; of a random matrix {noise[3]:.0f} % and {noise[15]:.0f} %.")  # fmt: skip
one_percent = max(1, round(len(learned) / 100))
print(f"the first 1 % ({one_percent} of {len(learned)}) hold {learned[one_percent - 1]:.0f} %")

# %% [markdown]
# The fall is steep, but not as steep as a note has it ("the first 1 % hold more than 90 %", with a paper that says the
# opposite: 2405.09673 found updates of code and mathematics of a rank 10 to 100 times LoRA's). The idea that few directions
# suffice is older: intrinsic dimension, 2012.13255.
#
# ## LoRA by hand
# So train only few directions: freeze $W_0$ and learn two thin matrices (2106.09685),
# $$h = W_0 x + \frac{\alpha}{r}\, B A x, \qquad A \in \mathbb{R}^{r \times k},\ B \in \mathbb{R}^{d \times r}.$$
# ```
# x ──┬──────────► W0 (frozen) ──────────────► + ──► h
#     └─► dropout ─► A (down) ─► B (up) ─► × α/r ─┘
# ```
# `A` projects *down* to $r$ numbers, `B` projects *up*. (Notes swap the two, or leave the scale out.) Dropout stands in front of
# `A`, in training only; peft's default is 0, QLoRA took 0.1 up to 13B and 0.05 beyond.
# ### Exercise 3.1 · LoRALinear (15 minutes)
# The interview classic. Wrap the layer you are given: a new `nn.Linear` called "frozen pre-trained weights", as one note
# has it, is random. `A` starts by `kaiming_uniform_` with `a=math.sqrt(5)`, as peft's.


# %%
class LoRALinear(nn.Module):
    """base(x) + scaling * dropout(x) A^T B^T, with the base frozen.

    Parameters A (r, in), random, and B (out, r), zero; scaling = alpha / r. Hint: base.weight.new_empty(...) gives a
    tensor of the base's dtype and device.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> None:
        # BEGIN SOLUTION
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / r
        # END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        # BEGIN SOLUTION
        down = self.dropout(x) @ self.A.T
        return self.base(x) + self.scaling * (down @ self.B.T)
        # END SOLUTION


LoRALinear = check.LoRALinear(LoRALinear)

# %%
torch.manual_seed(0)
linear, x = nn.Linear(32, 48), torch.randn(5, 32)
layer = LoRALinear(linear, r=4, alpha=8)
print("x", tuple(x.shape), "-> A", tuple((x @ layer.A.T).shape), "-> B", tuple((x @ layer.A.T @ layer.B.T).shape))
for alpha in (1, 8, 1e6):
    start = LoRALinear(linear, r=4, alpha=alpha)
    print(f"alpha {alpha:g}: largest change of the output at the start {(start(x) - linear(x)).abs().max().item()}")
print(f"std of A {layer.A.std():.4f}, 1/sqrt(3 in) = {1 / math.sqrt(3 * 32):.4f}")

# %% [markdown]
# The layer starts as the frozen one for *every* alpha, because `B` is zero. (So "alpha = r makes the update start at zero"
# is a myth.) The package's `LoRALinear` is yours with merging, switching and other kinds of layers; `inject` puts it
# in place of every linear layer but the head. The number of the first page again:

# %%
torch.manual_seed(0)
adapter = tuned("LoRA", lora.LoRALinear)

# %% [markdown]
# ## Initialisation, and the lock
# The gradients are $\partial L/\partial B \propto (\cdot) A^\top$ and $\partial L/\partial A \propto B^\top (\cdot)$. At the
# usual start, which factors move in the first step: `"only A"`, `"only B"`, `"both"` or `"none"`?

# %%
# BEGIN SOLUTION
guess = "both"
# END SOLUTION
target = torch.randn(5, 48)


def gradients(layer) -> tuple[float, float]:
    """Norms of the gradients of A and B for a squared error."""
    layer.zero_grad()
    (layer(x) - target).square().mean().backward()
    return layer.A.grad.norm().item(), layer.B.grad.norm().item()


a, b = gradients(LoRALinear(linear, r=4, alpha=8))
moved = {(True, False): "only A", (False, True): "only B", (True, True): "both"}.get((a > 0, b > 0), "none")
predict.choice("03-p2", guess, moved, options=["only A", "only B", "both", "none"])

# %%
for name, zero in {"A random, B zero": "B", "A zero, B random": "A", "both zero": "AB"}.items():
    layer = LoRALinear(linear, r=4, alpha=8)
    with torch.no_grad():
        layer.B.normal_()
        for factor in zero:
            getattr(layer, factor).zero_()
    optimizer = torch.optim.AdamW([layer.A, layer.B], lr=1e-2)
    first = gradients(layer)
    optimizer.step()
    print("{:18} step 1: A {:.3f} B {:.3f};  step 2: A {:.3f} B {:.3f}".format(name, *first, *gradients(layer)))

# %% [markdown]
# Either factor may be the random one (2406.08447: a random `A` stands larger rates). Both zero is a lock without a key. A
# note zeroes both after merging "to save memory": that frees no byte and ends all training.
#
# ## Scale: alpha, rank, learning rate
# Alpha and the learning rate are not independent. One step, with the scale $s = \alpha/r$ at 1, 2 and 4:

# %%
for optimizer_class in (torch.optim.Adam, torch.optim.SGD):
    sizes = []
    for s in (1, 2, 4):
        torch.manual_seed(0)
        layer = LoRALinear(linear, r=4, alpha=4 * s)
        gradients(layer)
        optimizer_class([layer.A, layer.B], lr=1e-3).step()
        sizes.append((layer.scaling * layer.B @ layer.A).norm().item())
    print(f"{optimizer_class.__name__:4}: relative size of the update", [round(size / sizes[0], 2) for size in sizes])

# %% [markdown]
# With Adam the update grows like $s$, so doubling alpha is much like doubling the rate; with SGD like $s^2$. Keep the scale
# fixed and tune the rate. But which scale stays fixed when the *rank* changes? A sum of $r$ random terms grows like
# $\sqrt r$, so $\alpha/r$ shrinks the update: rsLoRA (2312.03732) divides by $\sqrt r$.
# ### Exercise 3.2 · The scale of rsLoRA (5 minutes)


# %%
def rslora_scaling(alpha: float, r: int) -> float:
    """The factor in front of B A x."""
    # BEGIN SOLUTION
    return alpha / math.sqrt(r)
    # END SOLUTION


rslora_scaling = check.rslora_scaling(rslora_scaling)

# %%
ranks, wide = [4, 16, 64, 256], torch.randn(64, 512)
spread = {"LoRA": [], "rsLoRA": []}
for r in ranks:
    A, B = torch.randn(r, 512) / 512**0.5, torch.randn(512, r)  # factors after training: entries of a fixed size
    out = (wide @ A.T @ B.T).std().item()
    for name, scale in {"LoRA": lora.lora_scaling, "rsLoRA": rslora_scaling}.items():
        spread[name].append(scale(16, r) * out)
figure = plots.line(ranks, spread, "rsLoRA keeps the output's size as rank grows", "rank r (alpha = 16)", "output std")
figure.axes[0].set_yscale("log")
figure.axes[0].set_xscale("log", base=2)
figure.axes[0].set_xticks(ranks, ranks)
figure.set_size_inches(5.4, 2.7)
plots.show(figure, alt=f"LoRA falls from {spread['LoRA'][0]:.1f} to {spread['LoRA'][-1]:.2f}; rsLoRA stays between "
           f"{min(spread['rsLoRA']):.1f} and {max(spread['rsLoRA']):.1f}.")  # fmt: skip
print("rsLoRA with alpha = 2r:", {r: rslora_scaling(2 * r, r) for r in ranks}, "instead of 2: keep alpha fixed")

# %% [markdown]
# ## How many numbers
# One matrix of $d \times k$ costs $r(d + k)$ numbers, not $2rd$: matrices are seldom square.
# ### Exercise 3.3 · Parameters of an adapter (5 minutes)
# Llama-3.2-3B: 28 layers, hidden size 3,072, feed-forward 8,192, 8 key/value heads of 128. LoRA with r = 16 on all seven
# matrices of a layer (q, k, v, o, gate, up, down). How many numbers are trained? A note says 20,971,520.

# %%
# BEGIN SOLUTION
adapter_parameters = 28 * 16 * (2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192))
# END SOLUTION
adapter_parameters = check.adapter_parameters(adapter_parameters)

# %%
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.methods import counts

shape = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}  # fmt: skip
with torch.device("meta"):  # shapes without memory
    giant = inject.inject(LlamaForCausalLM(LlamaConfig(**shape)), r=16, alpha=32)
report = trainable_report(giant)
print(f"Llama-3.2-3B, without memory: {report['trainable']:,} = {report['share']:.2%} of {report['total']:,}")
eight = counts.lora_parameters_all_linear(hidden=4096, intermediate=14336, kv_width=1024, layers=32, rank=16)
print(f"Llama-3-8B, r=16, all linear: {eight:,}: {2e-6 * eight:.0f} MB in bf16, {4e-6 * eight:.0f} MB in fp32")
qkvo = counts.lora_parameters_attention(hidden=4096, kv_width=4096, layers=32, rank=16)
magnitudes = counts.dora_magnitudes_all_linear(hidden=4096, intermediate=14336, kv_width=1024, layers=32)
layer = nn.Linear(4096, 4096, device="meta")
print(f"DoRA adds {magnitudes:,} to Llama-3-8B; a 4096 x 4096 layer has {sum(p.numel() for p in layer.parameters()):,}")
print(f"LLaMA-7B, r=16, q k v o: {qkvo:,}; one 4096 x 4096 matrix, r=8: "
      f"{counts.dense_to_lora_ratio(4096, 4096, 8):.0f} times fewer; 1000 x 1000: {16_000 / 1000**2:.1%}")  # fmt: skip

# %% [markdown]
# ## Rank or rate: what matters more?
# Notes call rank "the most critical" setting; others say that it hardly matters if all layers are adapted. Here is the grid,
# five seeds each, recorded by `finetune-lab bench lora_effects --record` on the tiny model: 40 steps, alpha = 2r.

# %%
rows = {row["name"]: row["value"] for row in bench.recorded("lora_effects")["rows"]}


def found(setting: str, measure: str) -> tuple[float, float]:
    """Recorded mean and standard deviation over five seeds."""
    return rows[f"{setting}: {measure}"], rows[f"{setting}: {measure}, standard deviation"]


def tell(measure: str, *settings: str, digits: int = 3) -> None:
    for setting in settings:
        mean, sd = found(setting, measure)
        print(f"{setting:45} {measure} {mean:.{digits}f} ± {sd:.{digits}f}")


RATES, RANKS = ["0.001", "0.002", "0.004", "0.008"], [1, 4, 16, 64]
figure, ax = plots.axes("Each rank has its rate", "learning rate", "held-out loss (nats)", size=(5.4, 2.9))
said = []
for r, colour, marker in zip(RANKS, plots.COLOURS, plots.MARKERS, strict=False):
    means, sds = zip(*(found(f"answers, LoRA r={r} lr={rate}", "loss") for rate in RATES), strict=True)
    ax.errorbar(range(4), means, yerr=sds, color=colour, marker=marker, capsize=3)
    ax.annotate(f"r={r}", (0, means[0]), xytext=(-34, 0), textcoords="offset points", va="center", color=colour)
    said.append(f"r={r}: " + ", ".join(f"{m:.3f}" for m in means))
ax.set_xticks(range(4), RATES)
ax.set_xlim(-0.6, 3.2)
ax.set_yscale("log")
ax.set_ylim(0.01, 4)
plots.show(figure, alt="Loss at the four rates. " + "; ".join(said) + ".")
for r in RANKS:
    best = min(RATES, key=lambda rate, r=r: found(f"answers, LoRA r={r} lr={rate}", "loss")[0])
    tell("loss", f"answers, LoRA r={r} lr={best}")

# %% [markdown]
# At one rate rank seems to decide everything, because with alpha = 2r a larger rank also takes larger steps: look at
# 0.001. With its own best rate, r = 4, 16 and 64 reach the same loss within their spreads; only r = 1 stays behind.
# So sweep the rate first. And high rates have a price elsewhere: see "forgets less".
#
# The second target asks for room: 48 invented codes that no model can know ("It is 4821."), 100 steps. How many
# percent of them does r = 1 on all layers recall?

# %%
# BEGIN SOLUTION
guess = 50
# END SOLUTION
predict.number("03-p3", guess, actual=100 * found("codes, LoRA r=1 lr=0.002", "exact match")[0], unit="%")
settings = ["LoRA r=1 lr=0.002", "LoRA r=1 lr=0.008", "LoRA r=4 lr=0.002", "LoRA r=16 lr=0.002", "LoRA r=64 lr=0.002",
            "full lr=0.0005"]  # fmt: skip
tell("exact match", *(f"codes, {setting}" for setting in settings))
alphas = (" alpha=8 lr=0.001", " lr=0.001", " alpha=128 lr=0.001", " lr=0.004")
tell("loss", *(f"answers, LoRA r=16{setting}" for setting in alphas))

# %% [markdown]
# Now rank matters: r = 1 and 4 recall next to nothing, r = 16 a quarter, r = 64 four fifths, full fine-tuning as much
# as that within the spreads. The honest form of the folklore: where the base knows the matter and learns a manner,
# rank hardly matters once the rate fits; where new facts must be stored, it does (2405.09673: code and mathematics;
# QLoRA saw no effect in instruction tuning). 48 samples are no reason against LoRA.
#
# The last lines: alpha times four at a rate of 0.001 reaches the loss of a rate times four, as announced.
#
# ## Which layers
# The first LoRA paper adapted q and v only. A fair comparison spends equal parameters: r = 38 on q, k, v, o has exactly as many
# as r = 16 everywhere, r = 28 on the feed-forward layers 1.3 % more.

# %%
layers = {"all linear": "LoRA r=16 lr=0.002", "attention": "LoRA r=38 attention lr=0.002",
          "feed-forward": "LoRA r=28 feed-forward lr=0.002"}  # fmt: skip
for target, measure in (("answers", "loss"), ("codes", "exact match"), ("answers", "story perplexity")):
    tell(measure, *(f"{target}, {setting}" for setting in layers.values()))

# %% [markdown]
# On the questions, attention alone does as well as everything, and the feed-forward layers alone clearly worse; on
# the codes nobody is apart. But attention alone disturbs the stories more on the questions (2.57 ± 0.06 against 2.37
# ± 0.06). A note's "the feed-forward layers bring most" does not hold here. All linear layers is never
# the worst choice: start there.
#
# ## Learns less, forgets less?
# "LoRA Learns Less and Forgets Less" (2405.09673). To compare forgetting at *one* rate says little: whoever moves less forgets
# less. So draw what was learnt against what was forgotten (perplexity of the base's stories), along the rates.

# %%
curves = {"full": [f"full lr={rate}" for rate in ("0.00025", "0.0005", "0.001", "0.002")],
          "LoRA r=16": [f"LoRA r=16 lr={rate}" for rate in RATES[:3]],
          "LoRA r=64": [f"LoRA r=64 lr={rate}" for rate in RATES[:2]]}  # fmt: skip
title = "Down and left is better: learnt and kept"
figure, ax = plots.axes(title, "held-out task loss (nats)", "story perplexity", size=(5.4, 2.9))
for (name, settings), colour, marker in zip(curves.items(), plots.COLOURS, plots.MARKERS, strict=False):
    xs, dx = zip(*(found(f"answers, {s}", "loss") for s in settings), strict=True)
    ys, dy = zip(*(found(f"answers, {s}", "story perplexity") for s in settings), strict=True)
    ax.errorbar(xs, ys, xerr=dx, yerr=dy, color=colour, marker=marker, capsize=2, label=name)
ax.set(xscale="log", yscale="log")
ax.legend()
plots.show(figure, alt="; ".join(
    f"{name}: " + ", ".join(f"loss {found(f'answers, {s}', 'loss')[0]:.3f} perplexity "
                            f"{found(f'answers, {s}', 'story perplexity')[0]:.2f}" for s in settings)
    for name, settings in curves.items()))  # fmt: skip
tell("story perplexity", *(f"answers, {s}" for s in ("full lr=0.001", "LoRA r=16 lr=0.002", "LoRA r=16 lr=0.004",
                                                     "LoRA r=16 lr=0.008", "LoRA r=64 lr=0.001")))  # fmt: skip
tell("story perplexity", "codes, full lr=0.0005", "codes, LoRA r=16 lr=0.002", "codes, LoRA r=64 lr=0.002")
thin = 1e6 * torch.outer(torch.randn(48), torch.randn(32))
print(f"rank {torch.linalg.matrix_rank(thin)}, norm {thin.norm():.1e}: rank does not limit size")

# %% [markdown]
# On the questions the paper is right, with care: at an equal loss near 0.05, LoRA keeps the stories (2.35 to 2.37)
# where full fine-tuning loses some (2.72 ± 0.15). But LoRA with a high rate forgets without a limit: rank does not
# bound the norm. And r = 64 at a *low* rate forgets less than r = 16 at a high one, at the same loss.
#
# On the codes LoRA r = 16 learns less, and forgets *more* stories than full fine-tuning (2.54 ± 0.10 against 2.36 ±
# 0.04), against the textbook. A likely reason: full fine-tuning stores the facts in many small changes at a quarter
# of the rate; LoRA must make few directions large. "Forgets less" is a measurement to repeat, not a property.
#
# ## Intruder dimensions
# Two weights can do the same and look different. *Intruders* (2410.21228) are strong singular vectors of $W$ that are like no
# singular vector of $W_0$: new high-rank*ing* directions (a note read "high-rank").
# ### Exercise 3.4 · Count the intruders (15 minutes)
# `torch.linalg.svd(M, full_matrices=False).U` holds the left singular vectors as columns, strongest first.


# %%
def intruder_dimensions(before: Tensor, after: Tensor, k: int = 10, threshold: float = 0.5) -> int:
    """Of the k strongest left singular vectors of `after`, how many have |cosine| < threshold with ALL of `before`."""
    # BEGIN SOLUTION
    old = torch.linalg.svd(before.float(), full_matrices=False).U
    new = torch.linalg.svd(after.float(), full_matrices=False).U[:, :k]
    likeness = (new.T @ old).abs().amax(dim=1)
    return int((likeness < threshold).sum())
    # END SOLUTION


intruder_dimensions = check.intruder_dimensions(intruder_dimensions)

# %%
for name, now in {"full": full, "LoRA": weights(adapter)}.items():
    count = sum(intruder_dimensions(W0[path], now[path]) for path in paths)
    print(f"{name}, just trained: {count} intruders among {10 * len(paths)} strong directions")
for setting in ["full lr=0.001", "full lr=0.002", *(f"LoRA r=16 lr={rate}" for rate in RATES), "LoRA r=1 lr=0.008",
                "LoRA r=64 lr=0.002"]:  # fmt: skip
    count, size, ppl = (found(f"answers, {setting}", m) for m in ("intruders", "relative size", "story perplexity"))
    print(f"{setting:20} intruders {count[0]:5.1f} ± {count[1]:4.1f}   size of the update {100 * size[0]:4.1f} %   "
          f"story perplexity {ppl[0]:6.2f} ± {ppl[1]:.2f}")  # fmt: skip

# %% [markdown]
# The two live runs have none or next to none: their rate is too low to show any. The lines below them are the recorded
# runs, five seeds each. There it is as in the paper: at a comparable size of the update (8 to 12 %) LoRA has intruders, and
# full fine-tuning next to none. They grow with the rate, not with the rank alone. Are they "the root of forgetting"? Not
# the only one here: full fine-tuning at 0.002 has hardly any and forgets much.
#
# ## LoRA+
# In a wide model the right rate for `B` is larger than for `A` (2402.12354: start near a ratio of 16). It takes two parameter
# groups and no other cost than one more setting.
# ### Exercise 3.5 · The groups of LoRA+ (10 minutes)


# %%
def loraplus_groups(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    """Groups for AdamW: A (and other matrices) at lr, B (its name ends in "B") and 1-d parameters at lr * ratio.

    Only parameters that want a gradient; each group has params, lr and weight_decay.
    """
    # BEGIN SOLUTION
    slow, fast = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (fast if name.rpartition(".")[2] == "B" or p.ndim == 1 else slow).append(p)
    groups = [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return [group | {"weight_decay": weight_decay} for group in groups]
    # END SOLUTION


loraplus_groups = check.loraplus_groups(loraplus_groups)
print("rates of A and B:", [group["lr"] for group in loraplus_groups(adapter, 1e-4, 16)])
tell("loss", "answers, LoRA r=16 lr=0.002", "answers, LoRA r=16 lr=0.004",
     *(f"answers, LoRA+ r=16 ratio=4 lr={lr}" for lr in ("0.0005", "0.001")),
     *(f"answers, LoRA+ r=16 ratio=16 lr={lr}" for lr in ("0.00025", "0.0005")))  # fmt: skip
tell("story perplexity", "answers, LoRA r=16 lr=0.004", "answers, LoRA+ r=16 ratio=4 lr=0.001")

# %% [markdown]
# No setting is apart from LoRA at its own best rate. The argument is about *wide* models; this one is 192 wide. What
# the ratio does show: at a ratio of 4, B gets 0.004 while A stays at 0.001, and the stories stay whole (2.38 ± 0.03;
# LoRA at 0.004: 3.60 ± 0.51).
#
# ## DoRA by hand
# DoRA (2402.09353, equation 5) gives each row of the weight its own trained length $m$, and lets LoRA turn its direction:
# $$W' = m\, \frac{W_0 + sBA}{\lVert W_0 + sBA \rVert},$$
# row by row: one number an *output* (the paper's "columns" are those of the transpose). $m$ starts at the row norms of the
# loaded weight.
# ### Exercise 3.6 · The weight of DoRA (10 minutes)
# The norm is a constant for autograd (section 4.3: `.detach()`), which saves memory.


# %%
def dora_weight(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """m (W0 + dW) / ||W0 + dW||, row by row. weight and update (out, in), magnitude (out,)."""
    # BEGIN SOLUTION
    direction = weight + update
    norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True).detach()
    return magnitude[:, None] * direction / norm
    # END SOLUTION


dora_weight = check.dora_weight(dora_weight)

# %% [markdown]
# The `DoRALinear` of a public note computes dropout and scaling and then never uses them. It takes its magnitude from a random
# layer, before the weights are loaded; its formula divides $W_0$ by its norm first. Three lines for three bugs:


# %%
class NotesDoRA(nn.Module):
    """The note's forward pass, in short."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, alpha: float):
        super().__init__()
        self.linear, self.A, self.B, self.scaling = linear, A, B, alpha / len(A)
        self.magnitude = linear.weight.norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        lora_out = nn.functional.dropout(x) @ self.A.T @ self.B.T * self.scaling  # noqa: F841 (the bug)
        combined = self.linear.weight + self.B @ self.A
        return x @ dora_weight(combined, torch.zeros_like(combined), self.magnitude).T


A, B, m = torch.randn(4, 32), 0.1 * torch.randn(48, 4), linear.weight.norm(dim=1)
small, large = (NotesDoRA(linear, A, B, alpha)(x) for alpha in (8, 8000))
print("alpha 8 and 8000 give the same output:", torch.equal(small, large))
ours = dora_weight(linear.weight, B @ A, m)
theirs = dora_weight(linear.weight / m[:, None], B @ A, m)
print(f"normalising W0 first: weight off by {(theirs - ours).norm() / ours.norm():.0%}")
loaded = W0[paths[0]]
stale = dora_weight(loaded, torch.zeros_like(loaded), nn.Linear(*loaded.T.shape).weight.norm(dim=1))
print(f"magnitude from before the loading: weight off by {(stale - loaded).norm() / loaded.norm():.0%} at the start")

# %% [markdown]
# Now the picture of the paper (its figure 2) on our model: each point is one matrix at a quarter of the training, how far its
# rows turned against how much longer they got. The paper found a negative correlation for full fine-tuning and DoRA, a positive
# one for LoRA.

# %%
torch.manual_seed(0)
tuned("DoRA", dora.DoRALinear)
figure, ax = plots.axes(
    "LoRA couples length and turn most closely", "turn of the rows, 1 - cos", "change of their length", size=(5.2, 2.8)
)
signs = {}
for (name, points), colour, marker in zip(trails.items(), plots.COLOURS, plots.MARKERS, strict=False):
    longer, turned = map(list, zip(*points, strict=True))
    ax.plot(turned, longer, linestyle="", color=colour, marker=marker, markersize=4, label=name)
    signs[name] = torch.corrcoef(torch.tensor([turned, longer]))[0, 1].item()
ax.set(xscale="log", yscale="log")
ax.legend()
plots.show(figure, alt="All three methods: points rise from left to right. Correlation "
           + ", ".join(f"{name} {value:.2f}" for name, value in signs.items()))  # fmt: skip
tell("dM-dD correlation", "answers, full lr=0.001", "answers, LoRA r=16 lr=0.002", "answers, DoRA r=16 lr=0.002")
tell("loss", "answers, LoRA r=16 lr=0.002", "answers, DoRA r=16 lr=0.002")
tell("exact match", "codes, LoRA r=16 lr=0.002", "codes, DoRA r=16 lr=0.002")

# %% [markdown]
# The picture is one live run and its figures scatter; the recorded runs, five seeds each, are the lines below it. In
# those the order is the paper's, the sign is not. LoRA couples length and turn most closely (recorded: 0.97), DoRA (0.89)
# is where full fine-tuning is (0.88). But all are positive here: in so short a training everything grows with the
# steps, which a correlation over steps cannot tell apart. DoRA's points lie in level bands: Adam moves every magnitude
# by about rate × steps, however far the rows turn. In what was learnt DoRA and LoRA are not apart. The paper's gains
# (LLaMA-7B, commonsense: 74.7 to 78.4) are from larger models.
#
# ## What DoRA costs
# Notes say 10 %, or nothing, after one timed call without warm-up. Forward and backward of a small layer against the frozen
# layer alone, warmed up, interleaved, several rounds; then real sizes, recorded by `finetune-lab bench lora`.

# %%
from finetune_lab.lab.meter import interleaved_seconds, median_ratio
from finetune_lab.methods.lora_fused import FusedDoRALinear, FusedLoRALinear

frozen = nn.Linear(512, 512, bias=False).requires_grad_(False)
kinds = [lora.LoRALinear, FusedLoRALinear, dora.DoRALinear, FusedDoRALinear]
layers = {"frozen": frozen} | {kind.__name__: kind(frozen, 8, 16) for kind in kinds}
for tokens in (16, 512):
    batch = torch.randn(tokens, 512, requires_grad=True)
    calls = {name: lambda layer=layer, x=batch: layer(x).sum().backward() for name, layer in layers.items()}
    seconds = interleaved_seconds(calls, rounds=15)
    ratios = [f"{name} {median_ratio(seconds, name, 'frozen'):.1f}" for name in layers]
    print(f"{tokens:3} tokens, time over the frozen layer: " + ", ".join(ratios))
for row in bench.recorded("lora")["rows"]:
    name = row["name"]
    if name.startswith("d=2048 r=8 ") and name.endswith("A: time over frozen"):
        print(f"recorded, 512 tokens, {name}: {row['ratio']:.2f}")

# %% [markdown]
# With few tokens a step, the norm of the whole weight is most of DoRA's work; with many it fades. The fused form
# computes the same norm from thin products, $\lVert W\rVert^2 + 2s\sum (WA^\top \circ B) + s^2 \sum (BAA^\top \circ
# B)$.
#
# ## Merge, and what rounding costs
# For serving, write the update into the weight: no extra layer, no latency.
# ### Exercise 3.7 · Merge (10 minutes)


# %%
def merged_weight(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W0 + scaling * B A: added in fp32, rounded once to the dtype of weight (out, in). Changes nothing in place.

    weight, A and B may have different dtypes.
    """
    # BEGIN SOLUTION
    return (weight.float() + scaling * (B.float() @ A.float())).to(weight.dtype)
    # END SOLUTION


merged_weight = check.merged_weight(merged_weight)

# %% [markdown]
# Save the adapter, load it onto the base in three dtypes, and compare the logits before and after merging.

# %%
from finetune_lab.lab.adapters import load_adapter, save_adapter

folder = Path(tempfile.mkdtemp())
save_adapter(adapter, folder / "answers")
batch = torch.tensor([train.encode(tokenizer, data["answer"][1][:1])[0][0]])


@torch.no_grad()
def logits(model) -> Tensor:
    return model(input_ids=batch.to(model.device)).logits.float().cpu()


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    model = load_adapter(load(dtype=dtype)[0], folder / "answers")
    apart = logits(model)
    together = logits(inject.merge(model))
    same = (apart.argmax(-1) == together.argmax(-1)).float().mean()
    back = torch.equal(logits(inject.unmerge(model)), apart)
    print(f"{str(dtype)[6:]:9} largest difference {(apart - together).abs().max():.1e}, same best token {same:.0%}, "
          f"unmerged bit for bit: {back}")  # fmt: skip

# %% [markdown]
# fp32 agrees to rounding. In 16 bits the *small* update is rounded to the grid of the *large* weight: bf16 keeps 8 bits, fp16 11,
# hence the factor between the last lines. "Merged equals unmerged" holds to that. Merge from the fp32 base, evaluate the
# merged model, and keep the adapter.
#
# ## Two adapters on one base
# A second task, tickets to JSON, on the *same* base. The active adapter stands in the model; idle ones wait beside it.

# %%
torch.manual_seed(0)
host = load_adapter(load(seed=0)[0], folder / "answers", adapter="answers")
inject.inject(host, r=rank, alpha=2 * rank, adapter="tickets")
train.sft(host, tokenizer, data["extract"][0], steps=25, batch_size=recipe.batch_size, lr=recipe.lora_lr)
for name in ("answers", "tickets"):
    inject.set_adapter(host, name)
    print(f"adapter {name!r}: " + ", ".join(f"{task} {right(host, task):.0f} % right" for task in data))
with inject.disabled(host):
    print("disabled: the base again, bit for bit:", torch.equal(logits(host), logits(base)))

# %% [markdown]
# ## The same with the library people use
# peft, in six lines. Below, what it reads from our file, number by number: our layers and theirs are one function with one
# gradient.

# %%
from peft import LoraConfig, PeftModel, get_peft_model

warnings.filterwarnings("ignore", category=FutureWarning)  # peft 0.21 uses a name that transformers 5.23 changed

config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
peft_model = get_peft_model(load(seed=0)[0], config)
peft_model.print_trainable_parameters()
print("ours:", f"{trainable_report(adapter)['trainable']:,}")

# %%
theirs = PeftModel.from_pretrained(load(seed=0)[0], folder / "answers", is_trainable=True)
ours = load_adapter(load(seed=0)[0], folder / "answers")
print(f"largest difference of the logits: {(logits(theirs) - logits(ours)).abs().max():.1e}")
for model in (theirs, ours):
    model(input_ids=batch.to(model.device), labels=batch.to(model.device)).loss.backward()
gaps = []
for path in paths:
    mine = ours.get_submodule(path).B.grad
    other = theirs.get_base_model().get_submodule(path).lora_B["default"].weight.grad
    gaps.append((mine - other).abs().max() / other.abs().max())
print(f"largest relative difference of a gradient of B, {len(gaps)} matrices: {max(gaps):.1e}")
theirs.save_pretrained(folder / "from peft")
back = load_adapter(load(seed=0)[0], folder / "from peft")
print("their file in our model, same logits:", torch.equal(logits(back), logits(ours)))

# %% [markdown]
# ## Explore: rank cuts, alpha stretches
# The full fine-tune's update of one matrix, and the best LoRA of a rank. Find the rank that holds 90 %. What does alpha have to be
# so that nothing is stretched?

# %%
from ipywidgets import IntSlider

from finetune_lab.course.explorer import Explorer
from finetune_lab.course.spectrum import spectrum as picture

path = paths[len(paths) // 2]
values = torch.linalg.svdvals(updates[path]).tolist()


def draw(rank: int, alpha: int):
    """What the Explorer draws."""
    return picture(values, tuple(updates[path].shape), rank, alpha)


Explorer(draw, alt=f"Singular values of the full update of {path}, and those of a LoRA.",
         rank=IntSlider(8, 1, min(64, len(values))), alpha=IntSlider(16, 1, 128))  # fmt: skip

# %% [markdown]
# ## Myths
# What public notes get wrong, and where it is shown. Figures in brackets: one earlier run on SmolLM2-135M, not by a cell here.
#
# | you may read | what is true | shown in |
# |---|---|---|
# | B projects down, A up | A down, B up | LoRA by hand |
# | alpha = r makes the update start at zero | `B` = 0 does, for every alpha | LoRA by hand |
# | the frozen layer is a new `nn.Linear` | wrap the loaded one | LoRA by hand |
# | A is drawn from N(0, σ²) | peft: uniform, std 1/√(3k) | LoRA by hand |
# | only A may be random | either; both zero is locked | initialisation |
# | zero A and B after merging to save memory | frees nothing, ends training | initialisation |
# | the update grows like (α/r)·lr | with Adam; with SGD like (α/r)²·lr | scale |
# | rsLoRA with alpha = 2r | the scale becomes 2√r | scale |
# | rsLoRA needs no new rate | its size is stable; the best rate still moves | scale |
# | parameters = 2·r·d per matrix | r(d + k) | how many numbers |
# | 1000 × 1000, r = 8: below 1 % | 1.6 % | how many numbers |
# | thousands of times fewer | 256 for this matrix; 10,000 was GPT-3 with q and v | how many numbers |
# | Llama-3-8B, r = 16: 21 million | 41.9 million; 21 is r = 8 | how many numbers |
# | an adapter has 10 to 50 MB | 84 or 168 for that one | how many numbers |
# | 4096 × 4096 with bias: 16,777,216 frozen | 16,781,312 | how many numbers |
# | the first 1 % of directions hold > 90 % | not here, and the paper cited says the opposite | fine-tune changes |
# | rank is the most critical setting | the rate is; rank matters for new facts | rank or rate |
# | r = 16 reaches 95 % of full fine-tuning | depends on the task | rank or rate |
# | under 100 samples and 1B, LoRA has too few parameters | 48 codes are learnt [loss 0.29; prompt tuning 0.84, the floor] | rank or rate |
# | low rank limits the size of the update | rank 1 can have any norm | forgets less |
# | LoRA keeps the weights, so nothing is forgotten | the function changes | forgets less |
# | intruders are high-rank vectors | high-rank*ing*: with large singular values | intruder |
# | DoRA: $V = W_0/m$ | $V = W_0$, equation 5; and W' is not $W_0 + \Delta W$ | DoRA by hand |
# | a DoRALinear with dropout and alpha | dead code: neither has an effect | DoRA by hand |
# | magnitude from the layer before loading | from the loaded weight | DoRA by hand |
# | DoRA's norm has a gradient | constant, section 4.3 | DoRA by hand |
# | DoRA adds one vector of 4,096 | one for each matrix | how many numbers |
# | DoRA r = 16 equals LoRA r = 64 | no source; the paper has half-rank DoRA above LoRA | no cell here |
# | DoRA costs 10 %, or nothing | depends on form and tokens: time it | what DoRA costs |
# | LoRA+ at ratio 16, "A extracts, B classifies" | an argument about width; tune the ratio | LoRA+ |
# | train embeddings by LoRA, or never | new tokens need their full rows | no cell here |
#
# ## What breaks in practice
# Each of these is a thread somewhere. The package answers in one sentence where peft is silent.


# %%
def refused(action) -> None:
    """Print the sentence that an action is refused with."""
    try:
        action()
        print("accepted without a word")
    except ValueError as error:
        print("refused:", str(error).replace(str(folder), "the folder")[:150])


def fresh():
    return load_adapter(load(seed=0)[0], folder / "answers")


refused(lambda: inject.inject(load()[0], ["query"], r=4, alpha=8))
refused(lambda: inject.merge(inject.merge(fresh())))
refused(lambda: inject.merge(inject.inject(load()[0], ["lm_head"], r=4, alpha=8)))
stranger = load()[0]
for p in stranger.parameters():
    p.data = p.data.flip(0)
refused(lambda: load_adapter(stranger, folder / "answers"))
refused(lambda: PeftModel.from_pretrained(stranger, folder / "answers"))

# %%
settings = folder / "answers" / "adapter_config.json"
settings.write_text(settings.read_text().replace(f'"lora_alpha": {2 * rank}', f'"lora_alpha": {8 * rank}'))
print(f"alpha times four at load time: {right(fresh()):.0f} % right")

# %% [markdown]
# | symptom | test | fix |
# |---|---|---|
# | nothing is learnt | `trainable_report`: 0 numbers? | names in `target_modules` that match nothing |
# | LoRA learns slowly | the rate is the one of full fine-tuning? | about ten times it (2e-4 for large models) |
# | good in training, odd when loaded | alpha and r of the config | never edit them: the scale is part of the adapter |
# | garbage after loading | is it the base it was trained on? | same weights, same revision |
# | output twice as changed | merged twice? | a `merged` flag; keep the unmerged base |
# | merged model differs | compare logits in fp32 | merge in fp32, round once |
# | head changed its embedding too | are they tied? | untie, or leave the head out |
# | loss stands still in bf16 | dtype of A and B | adapters in fp32 (peft's default) |
# | the task needs many new facts | loss against rank | higher rank, full fine-tuning, or retrieval |
#
# ## Summary
# An adapter is two thin matrices beside a frozen one. Start: all linear layers, r = 16, alpha = 2r, and a rate several times
# that of full fine-tuning (four here, about ten for large models); sweep the rate before the rank. Measure what was
# forgotten. Keep adapters apart, merge for serving. The bill of the first page: the same answers right, from a ninth of
# the numbers.
#
# References: LoRA 2106.09685; rsLoRA 2312.03732; LoRA+ 2402.12354; DoRA 2402.09353; learns less and forgets less 2405.09673;
# intruders 2410.21228; intrinsic dimension 2012.13255; initialisation 2406.08447; QLoRA 2305.14314.
#
# Where next: lesson 04 puts the base into 4 bits; lesson 08 has the rest of the family.
# Drills: `finetune-lab drill --lesson 03`.
