# ---
# jupyter:
#   finetune_lab:
#     title: Start here
#     minutes: 15
#     needs: nothing
#     budget: start
# ---

# %% [markdown]
# # 00 · Start here
#
# **In fifteen minutes you turn a language model that cannot do a job into one that can, and you see what that cost.**
#
# Minutes: 15. You need: nothing but this page; run the cells from top to bottom (Shift + Enter).
# You will be able to:
# - say what fine-tuning changes, and what it costs in seconds, parameters and forgotten knowledge;
# - work with the lessons: predict first, write the missing lines, read the verdict;
# - choose your path through the course.

# %%
from finetune_lab.course import check, plots, predict
from finetune_lab.lab import models, tasks, tiers, train
from finetune_lab.lab.evaluate import general
from finetune_lab.lab.generate import answer

tier = tiers.tier()
model, tokenizer = models.load()
print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, tier: {tier.name}")

# %% [markdown]
# ## The problem
#
# A lamp shop gets tickets. It wants each one as a record: one line of JSON with four fields. Here is a ticket, the
# record that the shop wants, and what the base model says.

# %%
tests = tier.items("extract", "test", tier.test_items)
ticket = tests[0]["prompt"][-1]["content"]
wanted = tasks.reference(tests[0])
before = answer(model, tokenizer, [item["prompt"] for item in tests])
print("ticket:", ticket)
print("wanted:", wanted)
print("base:  ", before[0])

# %% [markdown]
# The base model has read about this world, letters and JSON included, but nobody told it *this* job. One ticket proves
# little, so we count. Exact match is the share of answers that equal the wanted record.

# %%
base_score = tasks.score("extract", before, tests)
print(f"exact match: {base_score['exact_match']:.0%} of {len(tests)} held-out tickets")

# %% [markdown]
# ## Predict, then run
#
# You will now train the model for about a minute on tickets with their records. The tickets of the test are new: other
# combinations of product, problem and wish, in phrasings that training never shows.
#
# **Predict:** what exact match, in percent, will the model reach on them? Write a number in place of the dots.

# %%
# BEGIN SOLUTION
guess = 90
# END SOLUTION

# %% [markdown]
# ## One minute of fine-tuning
#
# Seven things happen, in fine-tuning of any size: choose a **model**, collect **data**, choose a **method** (here LoRA:
# small matrices beside frozen weights), choose **settings** (steps, learning rate), **train**, **evaluate**, **save and
# use**. The curve is the loss on the records: how surprised the model is by each next token of the right answer.

# %%
recipe = tier.recipes["extract"]
items = tier.items("extract", "train", recipe.items)
tuned = train.add_lora(model, recipe.rank)
with plots.LiveCurve("The loss falls as the model learns the job", alt="Training loss of the tickets.") as curve:
    history = train.sft(
        tuned, tokenizer, items, steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lora_lr, on_step=curve
    )

# %%
after = answer(tuned, tokenizer, [item["prompt"] for item in tests])
tuned_score = tasks.score("extract", after, tests)
predict.number("00-p1", guess, 100 * tuned_score["exact_match"], unit="%")

# %% [markdown]
# The same prompts, before and after. The model that was a *text completer* now follows your format: that is what
# supervised fine-tuning (SFT) does.

# %%
prompts = [item["prompt"][-1]["content"] for item in tests]
plots.side_by_side(list(zip(prompts[:3], before[:3], after[:3], strict=True)))

# %% [markdown]
# ## What it cost and what it forgot
#
# The base model knew other things: facts about 64 towns, sums, stories. Training on tickets moved its weights.
#
# **Predict:** will it complete *fewer*, *as many* or *more* facts than before? As many means within five points.

# %%
# BEGIN SOLUTION
facts_guess = "fewer"
# END SOLUTION

# %%
with tuned.disable_adapter():  # the base model: the adapter is a switch
    knew = general(tuned, tokenizer, tier.test_items)
knows = general(tuned, tokenizer, tier.test_items)
change = knows["facts"] - knew["facts"]
outcome = "fewer" if change < -0.05 else "more" if change > 0.05 else "as many"
predict.choice("00-p2", facts_guess, outcome, options=["fewer", "as many", "more"])
for what in knew:
    print(f"{what:17} {knew[what]:6.2f} -> {knows[what]:6.2f}")

# %%
trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
total = sum(p.numel() for p in tuned.parameters())
print(f"trained  {trained:,} of {total:,} parameters ({trained / total:.1%})")
print(f"training {len(history)} steps, {len(history) * recipe.batch_size:,} tickets")
print(f"saved as an adapter: {4 * trained / 1e6:.1f} MB instead of {4 * total / 1e6:.1f} MB")

# %% [markdown]
# That is one run. The course claims an effect only over five seeds. The next cell reads the recorded bench, LoRA against
# **full fine-tuning**, which trains every weight. (You can repeat it: `finetune-lab bench world`.)

# %%
from finetune_lab.course.bench import figure


def recorded(method: str, what: str) -> str:
    mean, sd = (figure("world", f"extract {method}: {what} {part}")["value"] for part in ("mean", "sd"))
    return f"{mean:.2f} ± {sd:.2f}"


rows = {"extract exact_match": "exact_match"} | {k: f"{k} afterwards" for k in knew}
print(f"{'':22}base     LoRA r=16      full")
for base, what in rows.items():
    before_it = figure("world", f"base: {base}")["value"]
    print(f"{base:22}{before_it:.2f}     {recorded('LoRA r=16', what)}    {recorded('full', what)}")
after_answers = [figure("world", f"answer LoRA r=16: sums afterwards {part}")["value"] for part in ("mean", "sd")]
print("after training on short answers instead, sums: {:.2f} ± {:.2f}".format(*after_answers))
for method in ("LoRA r=16", "full"):
    print(f"{method}: {figure('world', f'extract {method}: training')['value']:.0f} seconds on one core")

# %% [markdown]
# Tickets cost this model next to nothing of what it knew: their records look like much that it has read. A hundred steps
# on short answers about towns cost it sums. How much is forgotten depends on the new data, not only on the method, so
# measure it every time, on what *you* want to keep. (A model this small is no measure for large ones.)
#
# Memory is the other half of the bill. With mixed-precision AdamW a trained weight takes 16 bytes (weight 2, gradient 2,
# fp32 copy 4, two moments 8) and a frozen one 2; other recipes take 8 or 12, so always ask *which*. Lesson 02 counts
# every byte.

# %% [markdown]
# ## Do you need fine-tuning at all?
#
# Try in this order; stop at the first that works.
#
# | Ask | Then |
# |---|---|
# | Does a better prompt, or a few examples in it, do? | Use the prompt. |
# | Is it about facts that change? | Put them into the prompt (retrieval). |
# | Is it a format, a tone, a skill, at scale? | Fine-tune: LoRA first. |
# | Does the base not fit your GPU in 16 bits? | QLoRA: the frozen base in 4 bits (lesson 04). |
# | Much data, far from pre-training, memory enough? | Full fine-tuning, measured against LoRA. |
# | Do you have better and worse answers? | Then DPO after SFT (lesson 06). |
#
# No such table is complete without the **size of the model**: 24 GB are plenty for 1B and nothing for 70B. And several
# tasks do not need more memory: one base serves many adapters.

# %% [markdown]
# ## The families of methods
#
# | Family | Idea | Example |
# |---|---|---|
# | full | every weight moves | full fine-tuning |
# | reparameterised | a small matrix product is added to a frozen weight | LoRA, DoRA (lesson 03) |
# | additive | new layers or new prompt vectors | adapters, prefix tuning |
# | selective | a few of the existing weights move | BitFit (biases; Llama models have none) |
# | hybrid | several of these | MAM adapter |
#
# All but the first are PEFT, parameter-efficient fine-tuning: the base stays frozen, so it can be shared and restored.

# %% [markdown]
# ## How a lesson works
#
# 1. **Predict.** You write a number before the cell shows it. Being wrong is the point.
# 2. **Exercise.** You replace `raise NotImplementedError` by a few lines. The last line of the cell checks them on random
#    cases and names the mistake if it knows it. Wrong or skipped? The lesson goes on with the reference: nothing breaks.
# 3. **Myths.** What common notes get wrong is disproved by a cell.
#
# ### Exercise 0.1 · Exact match (3 minutes)
# Try it. Exact match is a function of two lists.


# %%
def exact_match(predictions, references):
    """Share (0 to 1) of predictions equal to their reference, white space around both ignored; 0 for no items."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give one each")
    # BEGIN SOLUTION
    if not predictions:
        return 0.0
    right = sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))
    return right / len(predictions)
    # END SOLUTION


exact_match = check.exact_match(exact_match)

# %%
print(exact_match(after, [tasks.reference(item) for item in tests]))

# %% [markdown]
# `[ok]` and `[x]` are kept on this machine only. In a terminal: `finetune-lab status` shows them, `finetune-lab reset 00`
# gives a fresh copy of this notebook and keeps yours beside it.

# %% [markdown]
# ## Your machine and the tiers
#
# Every lesson runs on three kinds of models; one setting, `FINETUNE_LAB_MODEL`, chooses.
#
# | Tier | Model | For |
# |---|---|---|
# | `tiny` (default) | our own, pre-trained on an invented world | every notebook in seconds, offline |
# | `smollm2-135m` | a real English model, 135M | the same lessons on a laptop, in minutes |
# | any hub id or folder | what you use at work | a GPU |
#
# `finetune-lab doctor` tells which of them your machine can run. Everything stands on PyTorch, transformers, PEFT, TRL
# and bitsandbytes; nothing is downloaded inside a lesson.

# %% [markdown]
# ## The map of the course
#
# | Lesson | Question |
# |---|---|
# | 01 loss masking | Which tokens teach? |
# | 02 VRAM accounting | Will it fit? |
# | 03 LoRA and DoRA | How can so few numbers be enough? |
# | 04 NF4 and QLoRA | What is lost in four bits? |
# | 05 SFT with TRL | What does the real trainer do? |
# | 06 DPO | How does a model learn which answer is better? |
# | 07 model merging | Can two skills be added up? |
# | 16 interview drills | Would you say it right on Thursday? |
#
# The table in the README says which lessons are written. The order is that of practice: first SFT (*how to answer*), then preference alignment (*which answer is better*). DPO,
# by the way, is not reinforcement learning. Pictures to remember them by: full fine-tuning rewrites the book, LoRA writes
# notes in its margin, a quantized base is the paperback edition.

# %% [markdown]
# ## Where to go
#
# - **Learner:** open lesson 01 and go in order. Write code; do not only read.
# - **Instructor:** run sheets, agendas and typical wrong answers are in `docs/instructor.md`; complete lessons in `solutions/`.
# - **Interview:** read the myths and the summary of each lesson first, then practise with `finetune-lab drill` or
#   lesson 16; `finetune-lab drill --mock 45` is a mock interview.
#
# Next: `01_loss_masking.ipynb`.
