# ---
# jupyter:
#   finetune_lab:
#     title: VRAM accounting
#     minutes: 100
#     needs: lesson 00
#     budget: lesson
# ---

# %% [markdown]
# # 02 · VRAM accounting
# **"Will it fit?" has an exact answer: here you count every byte of a training step, and then make it fit.**
#
# Minutes: 100. You need: lesson 00, a little PyTorch. No GPU: bytes are the same on a CPU, and there the allocator tells all.
#
# You will be able to:
# - say what a parameter costs, byte by byte, and which regime a printed total belongs to;
# - count what autograd keeps, by formula and by measurement, equal to the byte;
# - choose the lever that helps: checkpointing, LoRA, 4 bits, 8-bit states, sharding;
# - schedule a step under a budget, and read an out-of-memory error.

# %%
import copy
import weakref

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune_lab.course import bench, check, plots, predict
from finetune_lab.lab import tiers, train
from finetune_lab.lab.meter import held_over_time, interleaved_seconds, median_ratio, peak_bytes
from finetune_lab.lab.models import load
from finetune_lab.methods.counts import nf4_bits_per_parameter

model, tokenizer = load()
tier = tiers.tier()
recipe = tier.recipes["extract"]
MB, GB = 10**6, 10**9


def twin(dtype: torch.dtype = torch.float32, layers: int = 5, attention: str = "sdpa") -> nn.Module:
    """A fresh model of the same shapes with at most `layers` layers, on the CPU, in training mode.

    Its weights are random: bytes do not ask what a model knows.
    """
    config = copy.deepcopy(model.config.get_text_config())
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()


batch = train.collate(train.encode(tokenizer, tier.items("extract", "train", recipe.batch_size)), 0)
del batch["attention_mask"]  # padding stands on the right: no real token sees it, and its labels are -100
rows, length = batch["input_ids"].shape
tokens = rows * length
net = twin()
weights, c = 4 * net.num_parameters(), net.config
print(f"{tier.name} model; one step sees {rows} tickets of at most {length} tokens: {tokens} tokens")
print(
    f"{c.num_hidden_layers} layers of width {c.hidden_size}, vocabulary {c.vocab_size:,}; weights: {weights / MB:.1f} MB"
)

# %% [markdown]
# ## The problem: small weights, large step
# One step of full fine-tuning with AdamW in fp32. The cell above printed the tokens, the shapes and the weights. Predict the
# peak of the whole step, in MB (10⁶ bytes): weights, gradients, optimizer and everything between.


# %%
def step_phases(net, batch: dict, optimizer) -> dict:
    """The parts of a training step, as functions without arguments."""
    kept = {}
    return {
        "forward": lambda: kept.update(loss=net(**batch, use_cache=False).loss),
        "backward": lambda: kept.pop("loss").backward(),
        "optimizer": optimizer.step,
        "zero": optimizer.zero_grad,
    }


# BEGIN SOLUTION
guess = 40
# END SOLUTION
adamw = torch.optim.AdamW(net.parameters(), lr=1e-4)
curves = held_over_time(step_phases(net, batch, adamw))
before = 3 * weights  # the weights and the two moments exist before the step
peak = before + max(max(curve) for curve in curves.values())
predict.number("02-p1", guess, round(peak / MB), unit="MB")
print(f"the step needs {peak / weights:.0f} times the weights")

# %% [markdown]
# And the totals that people print, for *the same job*, full fine-tuning of a 7B model: 56, 84, 94, 98, 112 and 126 GB. None
# of them holds what made our step so large. By the end you will know when each is right, and our step will need a tenth.
#
# ## Count what exists
# ### Exercise 2.1 · What a model and its optimizer hold (10 minutes)
# A tensor is a view; its *storage* is what the allocator gave. Two names may share one storage (tied embeddings), so count
# each storage once: `t.untyped_storage()` has `.data_ptr()` and `.nbytes()`.


# %%
def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """{"weights", "gradients", "optimizer"}: bytes that exist now. optimizer.state: parameter -> dict."""
    # BEGIN SOLUTION

    def total(tensors):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    weights = list(model.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    state = [x for entry in optimizer.state.values() for x in entry.values() if torch.is_tensor(x)]
    return {"weights": total(weights), "gradients": total(gradients), "optimizer": total(state)}
    # END SOLUTION


held_bytes = check.held_bytes(held_bytes)

# %% [markdown]
# ## Sixteen bytes, one by one
# What does one parameter cost? We load the model twice, make one step, and count bytes a parameter. Look at the optimizer:
# its moments have the dtype of the parameter, because AdamW makes them with `zeros_like`.


# %%
def stepped(net, make=torch.optim.AdamW):
    """(net, optimizer) after one step; the gradients are kept."""
    optimizer = make([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    net(**batch, use_cache=False).loss.backward()
    optimizer.step()
    return net, optimizer


for dtype in (torch.float32, torch.bfloat16):
    net, optimizer = stepped(twin(dtype))
    print(dtype, {name: round(count / net.num_parameters(), 2) for name, count in held_bytes(net, optimizer).items()})
print("one state holds:", {key: str(x.dtype) for key, x in next(iter(optimizer.state.values())).items()})

# %% [markdown]
# The state holds `step` and two moments: the gradient is *not* optimizer state. The "12 bytes of AdamW" that notes quote
# as m + v + gradient are, in the ZeRO paper (1910.02054), an fp32 **master weight** + m + v, beside 16-bit weights and
# gradients: 2 + 2 + 4 + 4 + 4 = 16. Why a master copy? The next section shows it.
#
# ### Exercise 2.2 · Five ways to count (5 minutes)
# Bytes a parameter, before any activation. Write the five numbers, in order:
#
# | | weights | gradients | moments |
# |---|---|---|---|
# | 1 | bf16 | bf16 | bf16 |
# | 2 | bf16 | bf16 | fp32 |
# | 3 | bf16, and an fp32 master copy | bf16 | fp32 |
# | 4 | fp32 | fp32 | fp32 |
# | 5 | fp32, and a bf16 copy to compute with | fp32 | fp32 |

# %%
# BEGIN SOLUTION
bytes_per_parameter = [8, 12, 16, 16, 18]
# END SOLUTION
bytes_per_parameter = check.bytes_per_parameter(bytes_per_parameter)

# %%
quoted = {
    "56 GB": (7 * bytes_per_parameter[0], "row 1: everything bf16; small updates vanish"),
    "84 GB": (7 * bytes_per_parameter[1], "row 2: no master copy (the count of the QLoRA paper)"),
    "94 GB": (7 * bytes_per_parameter[1] + 10, "row 2 and a guess of 10 GB for activations"),
    "98 GB": (7 * (2 + 12), "2 a parameter + 12 a trained one: the gradients were forgotten"),
    "112 GB": (7 * bytes_per_parameter[2], "row 3: mixed precision (or row 4: all fp32)"),
    "126 GB": (7 * bytes_per_parameter[4], "row 5: autocast's copy kept for the whole step"),
}
for name, (value, when) in quoted.items():
    print(f"{name:>6} = {value:3} GB  {when}")

# %% [markdown]
# So a total without its regime says nothing (and "7B" is 6.738 billion for LLaMA: 107.8 GB at 16 bytes). The regime is a
# choice about *precision*.
#
# ## Where small numbers die
# A weight of 1.0 in bf16. A thousand updates of −0.001 arrive. What is the weight afterwards?

# %%
# BEGIN SOLUTION
guess = 0.5
# END SOLUTION
weight = torch.tensor(1.0, dtype=torch.bfloat16)
for _ in range(1000):
    weight -= 1e-3
predict.number("02-p2", guess, weight, unit="")
half = torch.float16
tiny = torch.tensor(1e-5, dtype=half)
print(f"fp16: 1e-5 is {tiny:.3g}, its square (Adam's v) {tiny.square():.3g}, and 1 + 1e-5 is {1 + tiny:.6g}")
for info in (torch.finfo(half), torch.finfo(torch.bfloat16)):
    print(f"{info.dtype:9} largest {info.max:.3g}, smallest normal {info.tiny:.2g}, step near 1: {info.eps:.2g}")

# %% [markdown]
# Two different deaths. *Underflow*: the number itself is too small for fp16. *Swamping*: an update below half a step of the
# weight rounds away; bf16 is 8 times coarser than fp16 here. **Mixed precision** therefore computes in 16 bits and keeps in
# fp32 what must add up: master weights, moments, sums.
#
# ## Loss scaling
# bf16 has the range of fp32 and needs no scaling. fp16 does: multiply the loss by a scale, un-scale the gradients *before*
# clipping, not "when updating"; skip the step on inf.

# %%
w = nn.Parameter(torch.ones(4))
sgd = torch.optim.SGD([w], lr=1.0)
scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
print("1e-8 in fp16:", torch.tensor(1e-8).half().item(), "| scaled first:", torch.tensor(1e-8 * 65536).half().item())
scaler.scale(1e-3 * w.sum()).backward()
scaled = nn.utils.get_total_norm([w.grad])
scaler.unscale_(sgd)
print(f"norm before un-scaling {scaled:.0f}: clipping at 1 cuts it; after: {nn.utils.get_total_norm([w.grad]):.4f}")
scaler.step(sgd)
scaler.update()
before_step = w.detach().clone()
scaler.scale(float("inf") * w.sum()).backward()  # an overflow
scaler.step(sgd)
scaler.update()
print("step skipped:", torch.equal(w, before_step), "| new scale:", scaler.get_scale())

# %% [markdown]
# ## Smaller states, states elsewhere
# AdamW's moments are the largest part of full fine-tuning. Other optimizers, counted after one step
# (plain SGD keeps nothing):

# %%
import bitsandbytes as bnb

makers = {
    "SGD with momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
    "AdamW": torch.optim.AdamW,
    "AdamW, 8 bits": bnb.optim.AdamW8bit,
}
for name, make in makers.items():
    net, optimizer = stepped(twin(), make)
    print(f"{name:18} {held_bytes(net, optimizer)['optimizer'] / net.num_parameters():.3f} bytes a parameter")

# %% [markdown]
# 8-bit AdamW (2110.02861) keeps each moment in one byte, with a scale for every 256 numbers; small tensors stay fp32.
# Adafactor keeps row and column sums instead of v, and no m. *Paged* optimizers put the states where driver and CPU share
# pages: they move only when the card is full (lesson 04 simulates it; on a CPU bitsandbytes falls back to plain ones). *Offload* keeps master weights and moments in the CPU's memory for good: each step
# sends gradients down and weights up, 2 + 2 bytes a parameter. What that buys, by arithmetic, at 25 GB/s:

# %%
for name, trained in {"full fine-tuning of 7B": 7e9, "LoRA, 40M parameters": 40e6}.items():
    saved, traffic = 12 * trained / GB, 4 * trained / GB
    print(f"offload, {name:22}: {saved:5.1f} GB less on the card, {traffic / 25:.3f} s of traffic a step")

# %% [markdown]
# ## What autograd keeps
# So much for what sits still. Our step was dominated by the rest: **activations**, which forward leaves for backward.
# ### Exercise 2.3 · Bytes saved for backward (10 minutes)
# `torch.autograd.graph.saved_tensors_hooks(pack, unpack)` calls `pack(tensor)` for each tensor that autograd saves; what pack
# returns is kept, and `unpack` makes the tensor of it again. Weights are saved too, but they exist anyway. A dict, address ->
# bytes, will do. (The reference hands out boxes and keeps weak references, so that graphs which die in forward drop out.)


# %%
def saved_bytes(forward, parameters) -> int:
    """Bytes kept for backward once forward() has returned: each storage once, those of `parameters` not at all."""
    # BEGIN SOLUTION
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
    # END SOLUTION


saved_bytes = check.saved_bytes(saved_bytes)


def activations(net, inputs: dict) -> int:
    """Bytes that one forward pass of a model leaves for backward."""
    return saved_bytes(lambda: net(**inputs, use_cache=False).loss, net.parameters())


# %% [markdown]
# ### Exercise 2.4 · What one layer keeps for a token (10 minutes)
# Walk through one Llama layer in bf16, all weights trained. A weight's gradient needs the *input* of its matrix; a
# non-linear function needs what it was applied to. Add up, in bytes for one token (2 a number in bf16, 4 in fp32):
#
# - two norms, each: its input **in fp32**, 1/rms (one fp32 number), the normalised row in bf16;
# - the row that q, k and v read; the row that gate and up read;
# - attention: q and its output (`q_width`), k and v (`kv_width`), and one fp32 number a head (log-sum-exp);
# - MLP, `intermediate` wide: gate, silu(gate), up, and their product.


# %%
def layer_saved_bytes(hidden: int, intermediate: int, q_width: int, kv_width: int, heads: int) -> int:
    """Bytes a token that one layer keeps for backward."""
    # BEGIN SOLUTION
    norms = 2 * (4 * hidden + 4 + 2 * hidden)  # twice: the input in fp32, 1/rms in fp32, the normalised row
    inputs = 2 * (2 * hidden)  # what q, k, v read, and what gate and up read
    attention = 2 * (2 * q_width + 2 * kv_width) + 4 * heads  # q, k, v, the output; the log-sum-exp in fp32
    mlp = 4 * (2 * intermediate)  # gate, silu(gate), up, their product
    return norms + inputs + attention + mlp
    # END SOLUTION


layer_saved_bytes = check.layer_saved_bytes(layer_saved_bytes)

# %%
c = model.config.get_text_config()
size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
shape = (c.hidden_size, c.intermediate_size, size * c.num_attention_heads, size * c.num_key_value_heads)
formula = layer_saved_bytes(*shape, c.num_attention_heads)
two, three = (activations(twin(torch.bfloat16, layers=n), batch) for n in (2, 3))
print(f"a layer keeps {formula:,} bytes a token by formula, {(three - two) / tokens:,} measured")
print(f"34 * hidden, the published formula (2205.05198): {34 * c.hidden_size:,}")
print(f"everything else, mostly logits: {(three - 3 * formula * tokens) / tokens:,.0f} bytes a token")

# %% [markdown]
# Exact for Llama's family; other layers keep a little more (norms on heads, biases). The published formula describes GPT-3's
# layer. Calculators copy it: 25 % too low here, 31 % for Llama-3.1-8B, 46 % for Qwen2.5-7B. Then they forget the logits.
#
# ## Sequence length and FlashAttention
# All this is *linear* in tokens. One thing is not: the score matrix, sequence × sequence for each head. FlashAttention
# (2205.14135) computes exact attention in tiles and never stores it. transformers' `sdpa` does the same on a CPU; `eager`
# shows what it saves.

# %%
lengths = [32, 64, 128, 256]
kept = {}
for attention in ("eager", "sdpa"):
    net = twin(torch.bfloat16, layers=2, attention=attention)
    rows_of = [{"input_ids": torch.arange(n)[None], "labels": torch.arange(n)[None]} for n in lengths]
    kept[attention] = [activations(net, row) / MB for row in rows_of]
figure = plots.line(lengths, kept, "Stored scores grow with the square of the length",
                    "tokens in the sequence", "kept for backward (MB)")  # fmt: skip
plots.show(figure, alt=f"At {lengths[-1]} tokens eager attention keeps {kept['eager'][-1]:.1f} MB, sdpa "
           f"{kept['sdpa'][-1]:.1f} MB; sdpa is a straight line, eager bends upwards.")  # fmt: skip

# %% [markdown]
# So sequence length is the killer twice: linear everywhere, quadratic without flash attention, while batch size, its twin,
# can be replaced. **Gradient accumulation** runs the batch in parts: activations of one part, the same sum of gradients.
# (Divide by the tokens of the whole window: lesson 01.)

# %%
net = twin(torch.bfloat16)
for parts in (1, 2, 4):
    part = {name: x[: rows // parts] for name, x in batch.items()}
    print(
        f"{parts} micro-batches of {len(part['input_ids'])} rows: {activations(net, part) / MB:6.1f} MB of activations"
    )

# %% [markdown]
# ## The logits spike
# The last layer makes a number for each token *and each entry of the vocabulary*, and the loss wants it in fp32. The cell
# measures the peak of loss and backward in bytes for each such number, and counts the 16 layers of Llama-3.2-1B. The
# cell after it is yours: with plain `sft_loss`, of all that this model holds for a token, layers and logits, how many percent
# are logits?

# %%
from finetune_lab.methods.loss import chunked_loss, labelled_only_loss, sft_loss

vocab, places = 151_936, 64  # a vocabulary of Qwen
head = torch.randn(vocab, 64, dtype=torch.bfloat16)
states = torch.randn(1, places, 64, dtype=torch.bfloat16, requires_grad=True)
wanted = torch.randint(vocab, (1, places)).masked_fill(torch.arange(places) % 4 > 0, -100)  # a quarter counts
per_logit = {}
for way in (sft_loss, labelled_only_loss, chunked_loss):
    loss = (lambda: sft_loss(states @ head.T, wanted)) if way is sft_loss else lambda way=way: way(states, head, wanted)
    per_logit[way] = peak_bytes(lambda loss=loss: loss().backward()) / (places * vocab)
    print(f"{way.__name__:18} {per_logit[way]:5.2f} bytes for each token and vocabulary entry")
layers_1b = 16 * layer_saved_bytes(2048, 8192, 2048, 512, 32)
print(f"Llama-3.2-1B, one token: its 16 layers keep {layers_1b:,} bytes; vocabulary: 128,256 entries")

# %%
# BEGIN SOLUTION
guess = 10
# END SOLUTION
spike = per_logit[sft_loss] * 128_256
predict.number("02-p3", guess, round(100 * spike / (spike + layers_1b)), unit="%")

# %% [markdown]
# Not 2 bytes a logit, as `batch × sequence × vocabulary` in bf16 suggests: the fp32 copy, its log-softmax and the gradients
# come on top. That is where the
# "activation memory" of small models with large vocabularies sits. Score labelled positions only, or in chunks (lesson 01).
#
# ## Checkpointing's trade
# Gradient checkpointing (1604.06174) keeps each layer's *input* and runs the layer again when its backward comes. Notes say
# "saves 30 to 40 % of VRAM" for "a small amount of compute". Predict the extra FLOPs of a step, in percent.

# %%
from torch.utils.flop_counter import FlopCounterMode


def flops(net) -> int:
    """Floating-point operations of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        net(**batch, use_cache=False).loss.backward()
    return counter.get_total_flops()


# BEGIN SOLUTION
guess = 10
# END SOLUTION
plain, checkpointed = twin(), twin()
checkpointed.activation_checkpointing_enable()
predict.number("02-p4", guess, round(100 * (flops(checkpointed) / flops(plain) - 1)), unit="%")
a, b = activations(plain, batch), activations(checkpointed, batch)
print(f"kept between forward and backward: {a / MB:.1f} MB -> {b / MB:.1f} MB, {a / b:.1f} times less")
nets = {"with": checkpointed, "without": plain}
runs = {name: lambda net=net: net(**batch, use_cache=False).loss.backward() for name, net in nets.items()}
print(f"time of a step: x{median_ratio(interleaved_seconds(runs, 3), 'with', 'without'):.2f}")

# %% [markdown]
# One more forward is a third more work at most; the head is not run again. The saving depends on tokens only: weights and
# states stay. So checkpointing saves *nothing* where the peak lies elsewhere. Here is a step with 8 tokens:

# %%
for name, inputs in {"8 tokens": {key: x[:1, :8] for key, x in batch.items()}, f"{tokens} tokens": batch}.items():
    peaks = []
    for net in (plain, checkpointed):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
        curves = held_over_time(step_phases(net, inputs, optimizer))
        at = max(curves, key=lambda phase: max(curves[phase]))
        peaks.append(f"{max(curves[at]) / MB:6.1f} MB in {at}")
    print(f"{name:10} beyond weights and states: {peaks[0]}; checkpointing {peaks[1]}")

# %% [markdown]
# ## Memory over time
# The whole step as a picture, measured: what the allocator holds after each allocation and release. Look for three things:
# where the top is, what a tooth is, and what is left when backward ends.

# %%
figure, ax = plots.axes("Forward builds the mountain, backward takes it down", "", "held (MB)")
for name, colour, style in (("without", plots.BLUE, "-"), ("with", plots.VERMILLION, "--")):
    phases = step_phases(nets[name], batch, torch.optim.AdamW(nets[name].parameters(), lr=0.0))
    curves = held_over_time(phases)
    xs = [n + i / len(curve) for n, curve in enumerate(curves.values()) for i in range(len(curve))]
    held = [(before + value) / MB for curve in curves.values() for value in curve]
    ax.plot(xs, held, style, color=colour, label=f"{name} checkpointing: {max(held):.0f} MB")
ax.axhline(before / MB, color="black", linestyle=":", label="weights and moments")
ax.set_xticks([0.5, 1.5, 2.5, 3.5], phases)
ax.set_ylim(0)
ax.legend(loc="upper right")
plots.show(figure, alt="Memory through one step: without checkpointing one high mountain with its top where forward "
           "meets backward; with it a low plain with one tooth for each layer that is run again.")  # fmt: skip

# %% [markdown]
# The top is the loss: all activations, the logits and their gradient at once. Behind it each layer's backward frees what the
# layer kept and leaves its weights' gradients, which wait for the optimizer. With checkpointing a tooth is one layer, made
# again. The out-of-memory error names the tooth that did not fit, not who filled the memory.
#
# ### Exercise 2.5 · A puzzle: a step in few slots (15 minutes)
# Checkpointing as a game. A chain of layers; a *slot* holds what one layer keeps. Three actions: `("forward", i)` needs
# activation i−1 and makes i (0, the batch, is always there); `("drop", i)`; `("backward", i)` uses i and frees it. Layers go
# back in falling order. Keep every `step`-th activation, and the last stretch; run the other stretches again.


# %%
def keep_every(layers: int, step: int) -> list[tuple[str, int]]:
    """The actions of one step."""
    last = (layers - 1) // step * step  # where the last stretch begins
    # BEGIN SOLUTION
    actions = []
    for i in range(1, layers + 1):
        actions.append(("forward", i))
        if i - 1 < last and (i - 1) % step:
            actions.append(("drop", i - 1))
    for start in range(last, -1, -step):
        if start < last:
            actions += [("forward", i) for i in range(start + 1, start + step)]
        stop = min(start + step, layers)
        actions += [("backward", i) for i in range(stop, start, -1)]
    return actions
    # END SOLUTION


keep_every = check.keep_every(keep_every)

# %%
from finetune_lab.methods.memory.schedule import best_schedule, fewest_forwards, keep_all, play

plans = {"keep all": keep_all(12), "keep every 4th": keep_every(12, 4), "the record in 4 slots": best_schedule(12, 4)}
figure, ax = plots.axes("12 layers: fewer slots, more forwards", "action", "activations held")
for (name, plan), colour, style in zip(plans.items(), plots.COLOURS, ("-", "--", "-."), strict=False):
    done = play(plan, 12)
    ax.plot(range(1, len(plan) + 1), done.held, style, color=colour, label=f"{name}: {done.forwards} forwards")
    print(f"{name:22} {done.peak:2} slots, {done.forwards} forwards")
ax.legend(loc="upper right")
plots.show(figure, alt="Activations held against action number: keeping all rises to 12 and falls; keeping every 4th "
           "stays at 6 or below with three teeth; the record in 4 slots has many small teeth.")  # fmt: skip

# %% [markdown]
# A target to beat: `keep_every` needs 6 slots. Write a plan for 12 layers in 5 slots; `play` says what it costs, or which rule
# it breaks. The records (the binomial schedule of Griewank and Walther reaches each):

# %%
print("slots: fewest forwards", {slots: fewest_forwards(12, slots) for slots in range(2, 9)})
my_plan = keep_every(12, 4)  # change it
print(f"yours: {play(my_plan, 12).peak} slots, {play(my_plan, 12).forwards} forwards")

# %% [markdown]
#
# ## What LoRA saves, and what not
# LoRA freezes the base: no gradients, no moments for it. And activations? In bf16, with peft's defaults, does a LoRA step of
# the same batch keep `"less"`, `"as much"` (within 5 %) or `"more"` for backward than full fine-tuning?

# %%
# BEGIN SOLUTION
guess = "less"
# END SOLUTION
full = twin(torch.bfloat16)
lora = train.add_lora(twin(torch.bfloat16), recipe.rank)
ratio = activations(lora, batch) / activations(full, batch)
outcome = "more" if ratio > 1.05 else "less" if ratio < 0.95 else "as much"
predict.choice("02-p5", guess, outcome, options=["less", "as much", "more"])
print(f"{ratio:.2f} times; dtype of the adapter: { ({p.dtype for p in lora.parameters() if p.requires_grad}) }")
for name, net in {"full": full, "LoRA": lora}.items():
    held = {key: f"{value / MB:.1f}" for key, value in held_bytes(*stepped(net)).items()}
    print(f"{name:4} MB held: {held}, FLOPs: {flops(net) / flops(full):.2f}")

# %% [markdown]
# peft keeps adapters in fp32 on a 16-bit base, so each adapter casts its input to fp32 and keeps *that* copy beside the
# base's. Gradients and moments are nearly gone; activations grew; work fell by a third at most, since gradients still flow
# through every frozen matrix. DoRA keeps even more: tensors as large as the weights, for its norms. Ratios to full
# fine-tuning at SmolLM2-135M's width, recorded by `finetune-lab bench levers --record` (compile: to the same model without):

# %%
for row in bench.recorded("levers")["rows"]:
    if "first call" not in row["name"]:
        print(f"{row['name']:54} x {row['ratio']:.2f}")
first = bench.figure("levers", "compile, two layers: first call")["ratio"]
print(f"torch.compile: the first call costs as much as {first:.0f} steps, so it is not run in this lesson")

# %% [markdown]
# ## QLoRA's floor
# "8B in 4 bits is 4 GB", say notes. bitsandbytes quantises linear layers only, and not the last one.
# ### Exercise 2.6 · The floor of a 4-bit model (10 minutes)
# Bits a quantised weight: `nf4_bits_per_parameter(64, 256)`, 4 and the scales (lesson 04). Everything else: `other_bytes`.


# %%
def nf4_model_bytes(model: nn.Module, other_bytes: int) -> float:
    """Bytes of the weights: the weight of every nn.Linear but lm_head in NF4, the rest at other_bytes each."""
    # BEGIN SOLUTION
    modules = model.named_modules()
    linears = [m for name, m in modules if isinstance(m, nn.Linear) and not name.endswith("lm_head")]
    quantised = sum(m.weight.numel() for m in linears)
    other = sum(p.numel() for p in model.parameters()) - quantised
    return quantised * nf4_bits_per_parameter(64, 256) / 8 + other * other_bytes
    # END SOLUTION


nf4_model_bytes = check.nf4_model_bytes(nf4_model_bytes)

# %%
from transformers import AutoConfig

from finetune_lab.methods.memory.presets import PRESETS


def shell(name: str) -> nn.Module:
    """The real model class at its real size, parameters on the meta device: no memory."""
    config = dict(PRESETS[name])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


print("GB of weights    half a byte each   floor   after prepare_model_for_kbit_training")
for name in ("llama-2-7b", "llama-3.1-8b", "llama-33b", "llama-65b"):
    net = shell(name)
    floors = [nf4_model_bytes(net, size) / GB for size in (2, 4)]
    print(f"{name:14} {net.num_parameters() / 2 / GB:14.2f} {floors[0]:14.2f} {floors[1]:14.2f}")

# %% [markdown]
# `prepare_model_for_kbit_training` casts what is not quantised to **fp32** (notes say bf16). 65B needs 34 GB before any
# state: one 48 GB card, as the QLoRA paper says, never 24 GB; 33B fits 24 GB.
#
# ## Many cards: ZeRO
# Copies on every card are waste. ZeRO shards, over N ranks, the optimizer's 12 bytes (stage 1), then also the gradients (2),
# then also the weights (3). PyTorch's FSDP is stage 3.
# ### Exercise 2.7 · Bytes on each rank (5 minutes)


# %%
def zero_bytes_per_rank(parameters: float, ranks: int, stage: int) -> float:
    """Model state on each rank, mixed precision: 2 weights + 2 gradients + 12 optimizer. Stage 0 shards nothing."""
    # BEGIN SOLUTION
    weights, gradients, optimizer = 2.0, 2.0, 12.0
    if stage >= 1:
        optimizer /= ranks
    if stage >= 2:
        gradients /= ranks
    if stage >= 3:
        weights /= ranks
    return parameters * (weights + gradients + optimizer)
    # END SOLUTION


zero_bytes_per_rank = check.zero_bytes_per_rank(zero_bytes_per_rank)
print("7B, GB on each rank")
print("ranks    ", *(f"{ranks:4}  " for ranks in (1, 2, 4, 8, 64)))
for stage in range(4):
    print(f"stage {stage}", *(f"{zero_bytes_per_rank(7e9, ranks, stage) / GB:6.1f}" for ranks in (1, 2, 4, 8, 64)))

# %% [markdown]
# "112 GB needs 8 × A100" is a choice of speed: two cards of 80 GB hold the states, 56 GB each. Activations are *not*
# sharded: each rank has its own batch. Stage 3 pays with half as much traffic again (lesson 13).
#
# ## Will it fit? The estimator
# `finetune_lab.methods.memory` does what you did, for any architecture and recipe: every line with its reason, every moment
# of the step, the peak and its moment. `LiveBytes` counts each tensor from birth to death in a real step: the proof, here and
# in `finetune-lab bench vram`. Back to our step, lever after lever:

# %%
from finetune_lab.lab.livebytes import LiveBytes
from finetune_lab.methods.memory import Recipe, estimate, from_config

architecture = from_config(twin().config.to_dict(), "our model")


def measured_peak(net, size: int = rows, labelled: bool = False) -> int:
    """Bytes of all living tensors at the peak of one AdamW step on `size` rows."""
    part, kept = {name: x[:size].clone() for name, x in batch.items()}, {}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    phases = step_phases(net, part, optimizer)
    base = net.get_base_model() if hasattr(net, "get_base_model") else net

    def labelled_loss():
        hidden = base.model(part["input_ids"], use_cache=False)[0]
        kept["loss"] = labelled_only_loss(hidden, base.lm_head.weight, part["labels"])

    if labelled:
        phases |= {"forward": labelled_loss, "backward": lambda: kept.pop("loss").backward()}
    with LiveBytes() as live:
        live.watch([*net.parameters(), *part.values()])
        for phase in [*phases.values()] * 2:  # the states exist from the second step on
            phase()
    return live.peak


# %%
share = (batch["labels"][:, 1:] != -100).float().mean().item()
plan = {"method": "full", "dtype": "fp32", "update": "loop", "batch": rows, "seq": length}
levers = {"as it was": {}, "+ checkpointing": {"checkpointing": True},
          "+ labelled logits": {"logits": "labelled", "labelled": share}, "+ bf16": {"dtype": "bf16"},
          "+ LoRA": {"method": "lora", "rank": recipe.rank}, "+ micro-batches": {"batch": rows // 4}}  # fmt: skip
for name, lever in levers.items():
    plan |= lever
    net = twin(torch.bfloat16 if plan["dtype"] == "bf16" else torch.float32)
    if plan["method"] == "lora":
        net = train.add_lora(net, recipe.rank)
    if plan.get("checkpointing"):
        net.activation_checkpointing_enable()
    ledger = estimate(architecture, Recipe(**plan))
    real = measured_peak(net, plan["batch"], labelled="logits" in plan)
    print(f"{name:17} predicted {ledger.peak:13,}, measured {real:13,} bytes; peak: {ledger.peak_moment}")
print(f"from {peak / MB:.0f} MB to {real / MB:.1f} MB: {peak / real:.0f} times less")

# %% [markdown]
# Predicted to the byte. Read the last column: a lever moves the peak to another moment, and there the next one may do nothing.
# Logits at labelled positions gain nothing once the peak is a layer that is run again. LoRA, behind checkpointing and bf16,
# gains hardly anything on this small model, since its fp32 adapters make each layer fatter. Ask for the moment first.
#
# The same estimator on models that you cannot load here. Move the sliders; watch *which moment* is the peak, and what moves
# when you change method, length or checkpointing. On a card two things come on top of the tensors, stated apart because no CPU
# can prove them: the CUDA context, and what the allocator rounds and cannot fill.

# %%
from ipywidgets import Checkbox, Dropdown, SelectionSlider

from finetune_lab.course import vram_plot
from finetune_lab.course.explorer import Explorer
from finetune_lab.methods.memory.presets import GPUS

dense = [name for name, config in PRESETS.items() if not from_config(config, name).experts]
Explorer(
    vram_plot.explore,
    alt="Memory at the peak of one training step, stacked by category, beside the card's line.",
    model=Dropdown(options=dense, value="llama-3.1-8b"),
    method=Dropdown(options=["full", "lora", "dora", "qlora"], value="lora"),
    seq=SelectionSlider(options=[512, 1024, 2048, 4096, 8192], value=2048),
    batch=SelectionSlider(options=[1, 2, 4, 8, 16], value=1),
    checkpointing=Checkbox(False),
    optimizer=Dropdown(options=["sgd", "adamw", "adamw-8bit", "adafactor"], value="adamw"),
    gpu=Dropdown(options=list(GPUS), value="RTX-4090"),
)

# %% [markdown]
# "Which batch fits?" is a search. Memory only grows with the batch, so bisection finds the largest. The command
# `finetune-lab vram MODEL --fit 24GB` does this for batch, length and model, and ranks the levers.


# %%
from finetune_lab.methods.memory.fit import largest_batch

for name in ("llama-3.1-8b", "llama-33b"):
    for method in ("full", "lora", "qlora"):
        wish = Recipe(method=method, seq=1024, checkpointing=True, logits="labelled", optimizer="adamw-8bit")
        fits = largest_batch(from_config(PRESETS[name], name), wish, 24 * GB)
        print(f"{name:13} {method:6} on 24 GB: {fits} rows of 1,024 tokens")

# %% [markdown]
# ## The same with the library people use
# PyTorch's own tracker counts live storages, by kind. `accelerate estimate-memory` is the usual answer to "will it fit?".

# %%
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from torch.distributed._tools.mem_tracker import MemTracker

net, optimizer = stepped(twin())
optimizer.zero_grad()
tracker = MemTracker()
tracker.track_external(net, optimizer)
with tracker:
    for phase in step_phases(net, batch, optimizer).values():
        phase()
theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
buffers = sum(b.untyped_storage().nbytes() for b in net.buffers())
ours = measured_peak(net) + buffers - sum(x.nbytes for x in batch.values())  # it sees no ids and labels
kinds = {str(kind).split(".")[-1]: size for kind, size in theirs.items() if size}
print("MemTracker:", kinds)
print(f"ours: {ours:,}; difference: {kinds['Total'] - ours} bytes")
total = calculate_maximum_sizes(net)[0]
says = max(estimate_training_usage(total, "float32").values())
print(f"accelerate: {says / MB:.1f} MB; really {ours / MB:.1f} MB: it asks for no batch, no length, no method")

# %% [markdown]
# ## Myths
# Each line is a printed claim, and what the code of this lesson says.

# %%
from peft import prepare_model_for_kbit_training

from finetune_lab.methods.counts import layer_input_bytes, logits_bytes, lora_parameters_all_linear


def adapter(rank: int, wide: int = 11008, kv: int = 4096) -> int:
    """LoRA parameters of Llama-2-7B, all linear layers; Llama-3-8B: wide=14336, kv=1024."""
    return lora_parameters_all_linear(4096, wide, kv, 32, rank)


inputs, logits = layer_input_bytes(4, 4096, 4096, 32) / GB, logits_bytes(4, 4096, 128_256, 4) / GB
upcast = prepare_model_for_kbit_training(twin(torch.bfloat16), use_gradient_checkpointing=False)
coarser = torch.finfo(torch.bfloat16).eps / torch.finfo(half).eps
myths = [
    ("AdamW keeps m, v and the gradient", f"it keeps {list(next(iter(optimizer.state.values())))}"),
    ("Llama-3-8B, r=16, all linear: 21M", f"{adapter(16, 14336, 1024):,}; 21M is r=8"),
    ("Llama-3.2-3B, r=16: 20,971,520", f"{lora_parameters_all_linear(3072, 8192, 1024, 28, 16):,}"),
    ("lora_params(4096, 16, 32) = 8,388,608", f"{2 * 4096 * 16 * 32:,}: one matrix a layer, not two"),
    ("QLoRA trains less than 0.1 %", f"its own setting, r=64: {adapter(64) / (6.738e9 + adapter(64)):.1%}"),
    ("7B, r=16, all layers: 270 MB", f"{16 * adapter(16) / MB:.0f} MB; 270 MB is attention only"),
    ("16.8M in LoRA: 66 MB of moments", f"that is bf16; peft's fp32: {8 * 16.777:.0f} MB"),
    ("LoRA of 7B, 4 x 4096 tokens: 16 GB", f"{14 + 16 * adapter(16) / GB + inputs:.1f} GB by the notes' own formula"),
    (
        "the rank decides the memory",
        f"r=8 -> 64: {16 * (adapter(64) - adapter(8)) / GB:.1f} GB beside 14 GB of weights",
    ),
    ("LoRA tunes 10B models on 24 GB", f"bf16 weights alone: {2 * 10} GB, and 13B: {2 * 13} GB"),
    ("80 GB: full fine-tuning", f"16 bytes each: at most {80 / 16:.0f}B parameters, without activations"),
    ("activations are 2bshL", f"Llama-3-8B, 4 x 4096: {inputs:.1f} GB; fp32 logits: {logits:.1f} GB more"),
    ("checkpointing saves 30 to 40 %", f"{1 - b / a:.0%} of what autograd keeps here, 0 % of the states"),
    ("LoRA's activations are small too", f"{ratio:.2f} times those of full fine-tuning here"),
    ("kbit preparation casts to bf16", f"to {upcast.get_input_embeddings().weight.dtype}"),
    ("bf16 is slightly less precise", f"{coarser:.0f} times coarser than fp16"),
    (
        "FSDP shards weights and gradients",
        f"and states: {zero_bytes_per_rank(7e9, 8, 3) / GB:.0f} GB on each of 8 cards",
    ),
]
for claim, truth in myths:
    print(f"{claim:38} {truth}")

# %% [markdown]
# Others, where reading helps more than code: "QLoRA runs on a phone" is an estimate in the paper's outlook, not a
# demonstration; "30B to 70B need CPU offload on 24 GB" holds for 70B only; "several tasks need more VRAM": the number of
# tasks changes nothing; a table's "÷ 3 with LoRA" is GPT-3 with 1.2 TB of states, not your model.
#
# ## What breaks in practice
# Two silent ones, shown. A history of losses that keeps every graph alive (`loss.item()` would not), and
# checkpointing over a frozen input:

# %%
import warnings

from torch.utils.checkpoint import checkpoint

net, history = twin(), []
small = {name: x[:2] for name, x in batch.items()}
leak = held_over_time({f"step {n}": lambda: history.append(net(**small, use_cache=False).loss) for n in range(1, 4)})
print("losses.append(loss), MB held:", {name: round(curve[-1] / MB, 1) for name, curve in leak.items()})
history.clear()
frozen, layer = torch.ones(2, 8), nn.Linear(8, 8)  # the output of a frozen embedding has no gradient
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch does warn, once
    for reentrant in (True, False):
        y = checkpoint(layer, frozen, use_reentrant=reentrant)
        print(f"use_reentrant={reentrant}: the result requires a gradient: {y.requires_grad}")

# %% [markdown]
# | symptom | test | fix |
# |---|---|---|
# | out of memory in the first forward or backward | halve the length: does the peak halve? | activations: checkpointing, micro-batches, labelled logits |
# | the first backward passes, `optimizer.step` dies | the moments are made there | 8-bit states, LoRA, sharding |
# | dies at step 1,000 | is it the longest row? does memory grow each step? | longest batch first; `.item()`; drop the graph |
# | "tried to allocate 2 GB", 3 GB reserved but unallocated | `torch.cuda.memory_summary()` | `PYTORCH_ALLOC_CONF=expandable_segments:True` |
# | LoRA needs more than full fine-tuning | adapter dtype; activations of both | autocast, or `autocast_adapter_dtype=False`, checkpointing |
# | the peak is one copy of the logits above the estimate | does your loop keep `out = model(...)` until the step? | take `.loss` only, or `del out` |
# | checkpointing saves nothing | which moment is the peak? | that moment's lever: logits, or the optimizer |
# | "element 0 … does not require grad" | reentrant checkpointing over frozen embeddings | `use_reentrant=False`, or `enable_input_require_grads()` |
# | 8-bit Adam saves nothing | how many parameters are trained? | nothing: with LoRA the states are small already |
# | `nvidia-smi` shows more than torch | context (not measured here), reserved blocks | count them apart |
#
# ## Summary
# Weights, gradients and states follow the parameters: 8 to 18 bytes each, by regime. Activations follow the tokens, logits
# tokens × vocabulary. The peak is a moment: find it, then pull *its* lever. LoRA pulls states, 4 bits weights, checkpointing
# activations, and none of them the others'.
#
# References: ZeRO 1910.02054; mixed precision 1710.03740; checkpointing 1604.06174; activation formulas 2205.05198; 8-bit
# optimizers 2110.02861; FlashAttention 2205.14135; QLoRA 2305.14314; LoRA 2106.09685; ZeRO-Offload 2101.06840. Threads:
# LoRA above full fine-tuning, peft #1514 and #2196; no gradient with checkpointing, peft #137.
#
# Where next: lesson 03 builds LoRA and DoRA, lesson 04 the 4-bit weights. For your own model: `finetune-lab vram MODEL`.
# Drills: `finetune-lab drill --lesson 02`.
