# ---
# jupyter:
#   finetune_lab:
#     title: DPO and its family
#     minutes: 100
#     needs: lessons 01 and 03
#     budget: lesson
# ---

# %% [markdown]
# # 06 · DPO and its family
# **From "this answer is better than that one" to a loss of one line: derived, trained, and its side effects measured.**
#
# Minutes: 100. You need: lessons 01 and 03. No GPU.
#
# You will be able to:
# - derive the DPO loss from the objective of RLHF, and check each step with a number;
# - write DPO, IPO, KTO and SimPO, equal to TRL's;
# - read a preference run: rewards, both log-probabilities, KL, length, what was forgotten;
# - choose a method by the data you have, and find the mistakes that raise no error.

# %%
import copy
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_lab.course import bench, check, plots, predict
from finetune_lab.course.bench import dpo_effects
from finetune_lab.lab import generate, letters, policy, prefer, tabular, tiers, train
from finetune_lab.lab.evaluate import general
from finetune_lab.lab.models import load
from finetune_lab.lab.pairs import as_pairs, as_thumbs, encode_pairs, pair_logps, shared_pair_logps
from finetune_lab.methods import preference

warnings.filterwarnings("ignore", category=FutureWarning)  # peft 0.21 uses a name that transformers 5.23 changed
tier = tiers.tier()
recipe, dpo_recipe = tier.recipes["reply"], tier.recipes["dpo"]
tested = tier.items("reply", "test", min(tier.test_items, 50))
prompts = [item["prompt"] for item in tested]
IGNORE_INDEX = -100  # what does not count, as in lesson 01

# %% [markdown]
# ## The problem in one number
# A lighting shop answers its customers by mail. Half of its old letters are good: they thank, say sorry, name what will be
# done. The others are rude, long, or invent a gift. We fine-tune on all of them: SFT learns what was written, not what
# should have been.

# %%
start, tokenizer = load(seed=0)
archive = letters.old_letters(tier.items("reply", "train", recipe.items), good=0.5, seed=0)
train.sft(start, tokenizer, archive, steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.full_lr, seed=0)


def sampled(model, n: int = 2) -> list[list[str]]:
    """n sampled replies (temperature 1) to each held-out ticket."""
    return policy.sample(model, tokenizer, prompts, n=n, seed=0)


greedy = [[reply] for reply in generate.answer(start, tokenizer, prompts)]
print(f"greedy: {letters.good_share(greedy, tested):.0%} of {len(greedy)} replies keep the rule")

# %% [markdown]
# The rule is `lab.tasks.reply_faults`: courteous, at most 30 words, no invention, an answer. Greedy decoding shows the
# most likely reply only, and good letters are alike while bad ones are bad in many ways. Customers get samples. How many percent of *sampled* replies keep the rule?

# %%
said = sampled(start)
hurt = letters.good_share(said, tested)
# BEGIN SOLUTION
guess = 80
# END SOLUTION
predict.number("06-p1", guess, actual=100 * hurt, unit="%")
print({kind: f"{share:.0%}" for kind, share in letters.fault_shares(said, tested).items()})
for group in said[:4]:
    print("-", group[0])

# %% [markdown]
# The policy writes as the shop did. What we have: pairs of letters to the same ticket, and which one is better. What we
# want: a loss.
#
# ## From RLHF to a loss: preferences
# Assume that answers have a hidden reward $r$, and that people prefer the higher one with probability (Bradley and Terry)
# $$p(y_w \succ y_l) = \sigma(r_w - r_l).$$
# A *reward model* is trained on $-\log$ of that. Only differences of reward mean anything.

# %%
for margin in (0.0, 1.0, 2.0):
    pair = torch.tensor([3.0 + margin, 3.0])
    p = preference.bradley_terry(*pair)
    print(
        f"margin {margin:.0f}: p = {p:.3f}, loss {-p.log():.4f}; both +100: {preference.bradley_terry(*(pair + 100)):.3f}"
    )

# %% [markdown]
# ## The objective, and its optimum
# RLHF has three stages (2203.02155): SFT, reward model, PPO (reinforcement learning on samples). The last one looks for a policy with high reward on a leash,
# the KL divergence to a reference (the SFT model):
# $$\max_\pi\; \mathbb{E}_{y\sim\pi}[r(y)] - \beta\, \mathrm{KL}(\pi \,\Vert\, \pi_\text{ref}).$$
# PPO climbs it with samples (its *loss* is another formula, see the map below). But the optimum is known in closed
# form (2305.18290, equation 4):
# $$\pi^*(y) = \tfrac{1}{Z}\, \pi_\text{ref}(y)\, e^{r(y)/\beta}.$$
# ### Exercise 6.1 · The best policy (5 minutes)
# Take one ticket and five possible letters, so that everything can be enumerated. Hint: `torch.softmax` divides by $Z$.


# %%
def kl_optimum(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """pi*(y) = ref(y) exp(r(y) / beta) / Z, (n,). reference: (n,) probabilities; reward: (n,); beta > 0."""
    # BEGIN SOLUTION
    return torch.softmax(reference.log() + reward / beta, dim=-1)
    # END SOLUTION


kl_optimum = check.kl_optimum(kl_optimum)

# %%
reference = torch.tensor([0.15, 0.20, 0.10, 0.30, 0.25])
reward = torch.tensor([1.0, 0.6, 0.0, -0.4, -1.0])
best = kl_optimum(reference, reward, beta=0.5)
objective = preference.kl_objective(best, reference, reward, 0.5)
Z = (reference * (reward / 0.5).exp()).sum()
torch.manual_seed(0)
others = torch.distributions.Dirichlet(torch.ones(5)).sample((20_000,))
tried = preference.kl_objective(others, reference, reward, 0.5)
print(
    f"objective of the optimum {objective:.4f} = beta log Z {0.5 * Z.log():.4f}; best of 20,000 others {tried.max():.4f}"
)
for beta in (0.05, 0.5, 5):
    print(f"beta {beta:4}:", [round(p, 2) for p in kl_optimum(reference, reward, beta).tolist()])

# %% [markdown]
# Small beta, long leash: all on the best letter. Large beta: the reference. For texts, $Z$ is a sum over every possible
# letter, so $\pi^*$ cannot be computed. Here is the trick of DPO: read the formula backwards.
#
# ## Backwards: the policy is a reward model
# Solve for the reward: $r(y) = \beta \log\frac{\pi^*(y)}{\pi_\text{ref}(y)} + \beta \log Z$. In a difference of two
# answers to one prompt, $Z$ cancels. Put that into Bradley and Terry, write $\pi_\theta$ for $\pi^*$:
# $$L = -\log \sigma\Big(\beta \log\frac{\pi_\theta(y_w)}{\pi_\text{ref}(y_w)} - \beta
# \log\frac{\pi_\theta(y_l)}{\pi_\text{ref}(y_l)}\Big).$$

# %%
implicit = preference.implicit_rewards(best.log(), reference.log(), beta=0.5)
print(
    "reward minus implicit reward:",
    [round(x, 4) for x in (reward - implicit).tolist()],
    f"= beta log Z = {0.5 * Z.log():.4f}",
)
w, l = 0, 3
print(f"log-loss of the pair by reward {-F.logsigmoid(reward[w] - reward[l]):.4f}, by policies "
      f"{-F.logsigmoid(implicit[w] - implicit[l]):.4f}")  # fmt: skip

# %% [markdown]
# No reward model, no sampling, no reinforcement learning: two log-probabilities of two models. So write them.
# ### Exercise 6.2 · Log-probability of an answer (10 minutes)
# $\log \pi(y|x)$ is the sum over the *answer's* tokens. The labels are those of lesson 01: -100 at prompt and padding,
# not shifted.


# %%
def sequence_logps(logits: Tensor, labels: Tensor, average: bool = False) -> Tensor:
    """Log-probability of the labelled tokens of each row, in fp32, (batch,).

    logits: (batch, seq, vocab); labels: (batch, seq). average: divide by the number of labelled tokens.
    """
    # BEGIN SOLUTION
    scores, targets = logits[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    total = -losses.sum(1)
    return total / (targets != IGNORE_INDEX).sum(1) if average else total
    # END SOLUTION


sequence_logps = check.sequence_logps(sequence_logps)

# %%
held_out = as_pairs(tested)
rows = encode_pairs(tokenizer, held_out[:4])
print("prompt and answer of the first pair, tokens:", len(rows[0][0][0]), "of which labelled",
      sum(label != IGNORE_INDEX for label in rows[0][0][1]))  # fmt: skip
batch = train.collate([pair[0] for pair in rows], pad=0)
inputs = {key: value.to(start.device) for key, value in batch.items()}
with torch.no_grad():
    logits = start(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    without_logits = pair_logps(start, rows)[0]  # from hidden states, labelled positions only
print("chosen, sums:    ", [round(x, 2) for x in sequence_logps(logits, inputs["labels"]).tolist()])
print("the loop's own:  ", [round(x, 2) for x in without_logits.tolist()])
print("chosen, averages:", [round(x, 3) for x in sequence_logps(logits, inputs["labels"], average=True).tolist()])

# %% [markdown]
# ### Exercise 6.3 · The DPO loss (10 minutes)
# The interview classic. Return the rewards beside the loss: you will want to watch them.


# %%
def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """-log sigmoid of the difference of the implicit rewards. All four (batch,): summed log-probabilities.

    Returns (mean loss, chosen rewards, rejected rewards); the rewards, beta * (log pi - log ref), are detached.
    """
    # BEGIN SOLUTION
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected).mean(), chosen.detach(), rejected.detach()
    # END SOLUTION


dpo_loss = check.dpo_loss(dpo_loss)

# %%
zero = torch.zeros(1)
for beta in (0.1, 1.0, 10.0):
    print(
        f"beta {beta:4}: loss while policy = reference {dpo_loss(zero - 30, zero - 25, zero - 30, zero - 25, beta)[0]:.4f}"
    )
for now in (-3.0, 0.0, 3.0):
    chosen, rejected = torch.tensor([now], requires_grad=True), torch.zeros(1, requires_grad=True)
    dpo_loss(chosen, rejected, zero, zero, 1.0)[0].backward()
    print(f"margin {now:4.0f}: gradient of chosen {chosen.grad.item():.3f}, of rejected {rejected.grad.item():+.3f}; "
          f"sigmoid(-margin) {torch.sigmoid(torch.tensor(-now)):.3f}")  # fmt: skip

# %% [markdown]
# The loss starts at $\ln 2$, whatever beta is. The step goes against the gradient: chosen up, rejected down, both by
# $\beta\,\sigma(-\text{margin})$. Pairs that are wrong weigh most, pairs that are right fade out. The margin of DPO is one of
# rewards, beta inside; IPO's below is one of log-ratios, without.
#
# A pair's log-ratios are -5 (chosen) and -20 (rejected), beta is 0.1: *both* letters became less likely. Is the loss above or
# below $\ln 2$?

# %%
fallen = dpo_loss(zero - 5, zero - 20, zero, zero, 0.1)[0].item()
# BEGIN SOLUTION
guess = "below"
# END SOLUTION
predict.choice("06-p2", guess, "below" if fallen < math.log(2) else "above", options=["below", "above"])
print(f"loss {fallen:.4f}; ln 2 = {math.log(2):.4f}")

# %% [markdown]
# The loss sees a difference. It improves while the chosen letter becomes e⁵ times less likely. Keep that in mind.
#
# ## Does it reach the optimum?
# On five letters the promise can be tested: draw preferences from the hidden reward, train five logits by your DPO loss alone,
# compare with the optimum of RLHF. Total variation is the most that two distributions differ on any event.

# %%
beliefs = preference.bradley_terry(reward[:, None], reward[None, :])  # P(row is preferred over column)
end = tabular.train(reference, beliefs, lambda *logps: dpo_loss(*logps, beta=0.5), steps=200)
print("optimum of RLHF:", [round(p, 3) for p in best.tolist()])
print("trained by DPO: ", [round(p, 3) for p in end["policy"].tolist()])
print(f"total variation {preference.total_variation(end['policy'], best):.1e}")

# %% [markdown]
# The same distribution, without ever seeing a reward. Two assumptions carry it: every pair is seen, and preferences are
# noisy as Bradley and Terry say. Real data keeps neither; the rest of this lesson is about that.
#
# ## What to watch: implicit rewards
# ### Exercise 6.4 · Accuracy (5 minutes)
# How often has the chosen answer the higher reward? Before the first step all rewards are equal but for rounding.


# %%
def reward_accuracy(chosen: Tensor, rejected: Tensor, tie: float = 0.0) -> Tensor:
    """Share of pairs whose chosen reward is higher, a scalar; a margin of at most `tie` in size counts one half."""
    # BEGIN SOLUTION
    margin = chosen - rejected
    return torch.where(margin.abs() <= tie, 0.5, (margin > 0).float()).mean()
    # END SOLUTION


reward_accuracy = check.reward_accuracy(reward_accuracy)

# %% [markdown]
# ## Train
# `prefer.dpo` is the loop of lesson 01 around *your* loss. The reference is the policy before its first step; its
# log-probabilities are computed once. Beta is 1 here; other values follow. How many percent of sampled letters
# will keep the rule afterwards?

# %%
pairs = as_pairs(tier.items("reply", "train", 96, seed=100))
for pair in pairs[:3]:
    print("chosen:  ", pair["chosen"][0]["content"], "\nrejected:", pair["rejected"][0]["content"])
before = prefer.pair_logps_of(start, tokenizer, held_out)
how = {"batch_size": min(6, dpo_recipe.batch_size), "lr": dpo_recipe.full_lr, "warmup": 3, "logps": shared_pair_logps}
aligned = copy.deepcopy(start)
with plots.LiveCurve("The DPO loss falls from ln 2", alt="The DPO loss.") as curve:
    prefer.dpo(aligned, tokenizer, pairs, steps=16, beta=1.0, loss=dpo_loss, on_step=curve, **how)

# %%
said_after = sampled(aligned)
healed = letters.good_share(said_after, tested)
# BEGIN SOLUTION
guess = 90
# END SOLUTION
predict.number("06-p3", guess, actual=100 * healed, unit="%")
print(f"good letters: {hurt:.0%} -> {healed:.0%}; against the start it wins {letters.win_rate(said_after, said, tested):.0%} "
      "of comparisons, a tie counting half")  # fmt: skip
after = prefer.pair_logps_of(aligned, tokenizer, held_out)
rewards = preference.implicit_rewards(after, before, beta=1.0)
print(f"held-out accuracy {reward_accuracy(*rewards, tie=1e-4):.0%}, margin {(rewards[0] - rewards[1]).mean():.1f}")
print("log-probability, nats: chosen {:+.1f}, rejected {:+.1f}".format(*(after - before).mean(1)))

# %%
numbered = [n for n, group in enumerate(said) if letters.good_share([group[:1]], [tested[n]]) < 1][:3]
plots.side_by_side([(prompts[n][-1]["content"], said[n][0], said_after[n][0]) for n in numbered])

# %% [markdown]
# ## Beta: what the leash buys
# One run proves little. From here on: recorded figures of `finetune-lab bench dpo_effects` on the tiny model, five starts, five
# sets of 96 pairs, mean ± standard deviation. All settings share the starts, pairs and tickets, so two are compared seed by
# seed. They are *apart* (a star) if the 95 % t-interval of that difference leaves out 0. Not apart does not mean equal: five
# seeds see large effects only; and one star in twenty comes by chance. Does a smaller beta write better letters?

# %%
rows = {row["name"]: row["value"] for row in bench.recorded("dpo_effects")["rows"]}


def found(setting: str, measure: str) -> tuple[float, float]:
    """Recorded mean and standard deviation over five seeds."""
    return rows[f"{setting}: {measure}"], rows[f"{setting}: {measure}, standard deviation"]


def tell(measures: list[str], *settings: str) -> None:
    for setting in settings:
        parts = ["{} {:.2f} ± {:.2f}".format(measure, *found(setting, measure)) for measure in measures]
        print(f"{setting:42}", "  ".join(parts))


def compare(measures: list[str], other: str, *settings: str) -> None:
    """Differences to `other` seed by seed: mean ± half of the 95 % interval, a star if it leaves out 0."""
    print("minus", other)
    for setting in settings:
        gaps = [(measure, *dpo_effects.paired(setting, other, measure)) for measure in measures]
        print(
            f"{setting:42}",
            "  ".join(f"{m} {gap:+.2f} ± {half:.2f} {'*' if abs(gap) > half else ' '}" for m, gap, half in gaps),
        )


BETAS = {beta: f"dpo beta={beta:g} lr=0.0001" for beta in (0.1, 1, 10)}
TOO_FAR = "dpo beta=0.1 lr=0.0003"

# %%
gap, half = dpo_effects.paired(BETAS[0.1], BETAS[10], "good")
# BEGIN SOLUTION
guess = "better"
# END SOLUTION
predict.choice("06-p4", guess, "not apart" if abs(gap) <= half else "better" if gap > 0 else "worse",
               options=["better", "worse", "not apart"])  # fmt: skip
tell(["good", "win rate", "accuracy", "KL"], "start", *BETAS.values(), TOO_FAR)
tell(["training loss"], *BETAS.values(), TOO_FAR)
compare(["good", "KL", "story perplexity"], BETAS[10], BETAS[1], BETAS[0.1])
compare(["good"], "start", *BETAS.values(), TOO_FAR)
print("beta 1, good letters seed by seed:", [round(rows[f"{BETAS[1]}: good, seed {n}"], 2) for n in range(5)])

# %% [markdown]
# The first seed, shown above, is the best of the five. The accuracy is the same everywhere, while the letters differ.
# And beta 0.1 with three times the rate is *worse than the start*, at a perfect accuracy and with a lower training loss than
# the good run of the same beta (0.12 against 0.50).
#
# How much KL does an improvement need? If a policy only moves probability from bad letters to good ones, from a share $g$
# to $w$, it pays $w\ln\frac wg + (1-w)\ln\frac{1-w}{1-g}$ nats: the optimum of the objective above, with reward 1 and 0.
# No policy lies left of that curve.

# %%
from ipywidgets import SelectionSlider

from finetune_lab.course.explorer import Explorer
from finetune_lab.course.frontier import Point, frontier

places = {f"beta {beta:g}": name for beta, name in BETAS.items()}
places |= {"beta 0.1, rate × 3": TOO_FAR}
points = {
    label: Point(found(name, "KL"), found(name, "good"),
                 f"Chosen {found(name, 'chosen change')[0]:+.1f}, rejected {found(name, 'rejected change')[0]:+.1f} nats; "
                 f"{found(name, 'words')[0]:.0f} words; stories {found(name, 'story perplexity')[0]:.1f}.")
    for label, name in places.items()
}  # fmt: skip


def draw(setting: str):
    """What the Explorer draws: recorded points, no training."""
    return frontier(points, found("start", "good")[0], setting)


Explorer(draw, alt="Share of good replies against KL, four settings and the bound.",
         setting=SelectionSlider(options=list(points), value="beta 1"))  # fmt: skip

# %% [markdown]
# The three betas are not apart in good letters, though 10 against 0.1 narrowly; all are above the start. In KL each is apart:
# the shorter leash does as well for half of the distance. At beta 0.1 three times the rate changes more than a hundredfold
# beta, so sweep both.
#
# All points lie right of the curve: 84 % good letters can be had for 0.2 nats. The rest went into wording, and in the
# last run into letters that are no answer. The same run here:

# %%
broken = copy.deepcopy(start)
prefer.dpo(broken, tokenizer, pairs, steps=16, beta=0.1, loss=dpo_loss, **(how | {"lr": 3 * how["lr"]}))
for group in sampled(broken)[:6]:
    print("-", group[0])

# %%
figure, ax = plots.axes("Wins rise with a little KL and fall with much", "KL (nats a reply, square-root axis)",
                        "wins against the start (%)", size=(5.2, 2.7))  # fmt: skip
for marker, name in zip("Dosv^", ["start", *BETAS.values(), TOO_FAR], strict=True):
    (kl, kl_sd), (wins, wins_sd) = found(name, "KL"), found(name, "win rate")
    ax.errorbar(kl**0.5, 100 * wins, yerr=100 * wins_sd, xerr=kl_sd / 2 / max(kl, 1e-9) ** 0.5, marker=marker, capsize=2,
                linestyle="", label=name.replace("dpo ", ""))  # fmt: skip
ax.set_xticks([0, 0.5, 1, 2, 3], ["0", "0.25", "1", "4", "9"])
ax.legend(fontsize=8)
plots.show(figure, alt="Win rate at KL: " + "; ".join(
    f"{name} {100 * found(name, 'win rate')[0]:.0f} % at {found(name, 'KL')[0]:.1f} nats" for name in (*BETAS.values(), TOO_FAR)))  # fmt: skip

# %% [markdown]
# This is over-optimisation (2406.02900; for reward models 2210.10760): along the KL, quality rises, then falls, and neither a
# falling loss nor the accuracy says so. Judge samples, and draw them against KL.
#
# ## Side effects: both letters, forgetting, sameness
# The loss pays for a difference. Where did the probability come from? Held-out pairs, change of their summed log-probability.

# %%
shown = {"beta 10": BETAS[10], "beta 1": BETAS[1], "beta 0.1": BETAS[0.1], "beta 0.1,\nrate × 3": TOO_FAR}
figure, ax = plots.axes(
    "The loss pays for a difference, not for the chosen letter", "", "change (nats, log beyond ±1)", size=(5.6, 3)
)
for offset, side, colour, hatch in ((-0.2, "chosen", plots.BLUE, ""), (0.2, "rejected", plots.VERMILLION, "//")):
    for n, name in enumerate(shown.values()):
        mean, sd = found(name, f"{side} change")
        ax.bar(n + offset, mean, 0.36, yerr=sd, color="white", edgecolor=colour, hatch=hatch, capsize=3,
               label=side if n == 0 else None)  # fmt: skip
        end, away = (mean + sd, 4) if mean > 0 else (mean - sd, -13)
        ax.annotate(f"{mean:+.1f}", (n + offset, end), xytext=(0, away), textcoords="offset points", ha="center")
ax.set_xticks(range(len(shown)), list(shown))
ax.axhline(0, color=plots.BLACK, linewidth=1)
ax.set_yscale("symlog", linthresh=1)
ax.margins(y=0.25)
ax.legend(loc="lower left")
plots.show(figure, alt="Change of log-probability. " + "; ".join(
    "{}: chosen {:+.1f} ± {:.1f}, rejected {:+.1f} ± {:.1f}".format(
        label.replace("\n", " "), *found(name, "chosen change"), *found(name, "rejected change"))
    for label, name in shown.items()))  # fmt: skip

# %%
tell(["story perplexity", "facts kept", "sums kept"], "start", *shown.values())
base = load(seed=0)[0]
print(f"stories of the base, seed 0: {general(base, tokenizer, 30)['story_perplexity']:.2f}")
compare(["story perplexity", "sums kept", "distinct", "most common opening"], "start", *shown.values())

# %% [markdown]
# In the moderate runs the chosen letter gains half a nat and the rejected one loses two to four. At three times the rate *both*
# fall, in every seed: likelihood displacement (2410.08847). The probability went to other texts, such as the samples above.
#
# The alignment tax: the facts are all kept, the sums are not apart, the perplexity of the base's stories is 2.3, 4.3 after SFT,
# which pays the larger part, and 5.6 after DPO (beta 1); 13 in the broken run. The smaller beta forgets more: 5.8 with
# 0.1, 5.0 with 10, and that is apart. Sameness: of 80 letters to 40 tickets fewer are distinct, and part of that is wanted,
# since invented codes were all different. Variety collapses in the broken run.
#
# ## Length, and SimPO
# DPO compares *sums*, and a sum hangs on length. Take only pairs whose chosen letter is the shorter one (the rejected is long
# or invents a gift), or only those where it is longer (the rejected is rude). No pair says "shorter is better".

# %%
SHORTER, LONGER = "dpo beta=1 lr=0.0001, only shorter chosen", "dpo beta=1 lr=0.0001, only longer chosen"
for only in (dpo_effects.SHORTER, dpo_effects.LONGER):
    some = dpo_effects.clean_pairs(only, 0, 96)
    count = {side: sum(len(p[side][0]["content"].split()) for p in some) / 96 for side in ("chosen", "rejected")}
    print(f"only {only}: words", {side: round(mean, 1) for side, mean in count.items()})
tell(["words", "good", "no answer"], "start", BETAS[1], SHORTER, LONGER)
compare(["words", "good", "no answer"], "start", SHORTER, LONGER)

# %% [markdown]
# Chosen letters have 17 words in both kinds of pairs, and both runs write shorter than the start. With longer chosen letters
# the length arrives there; with shorter ones it undershoots (13.8), and more letters name no action: 0.33 ± 0.14 against
# 0.17 ± 0.08, apart. Chosen and rejected share a long beginning there; what was taught is "stop". And neither half alone
# lifts the good letters apart from the start. On large models the usual bias is the other way:
# people choose the longer answer, and DPO makes it longer still (2403.19159).
#
# SimPO (2405.14734, equation 6) compares averages over the tokens, without a reference, and asks for a margin $\gamma$:
# $$L = -\log\sigma\big(\tfrac{\beta}{|y_w|}\log\pi(y_w) - \tfrac{\beta}{|y_l|}\log\pi(y_l) - \gamma\big).$$
# ### Exercise 6.5 · SimPO (5 minutes)


# %%
def simpo_loss(policy_chosen, policy_rejected, beta, gamma):
    """Both (batch,): log-probabilities AVERAGED over the answer's tokens. Returns as dpo_loss; rewards beta * average."""
    # BEGIN SOLUTION
    chosen, rejected = beta * policy_chosen, beta * policy_rejected
    return -F.logsigmoid(chosen - rejected - gamma).mean(), chosen.detach(), rejected.detach()
    # END SOLUTION


simpo_loss = check.simpo_loss(simpo_loss)

# %%
lengths = torch.tensor(
    [[sum(t != IGNORE_INDEX for t in row[1]) for row in pair] for pair in encode_pairs(tokenizer, held_out)]
).T
average = before / lengths
print(
    f"average log-probability at the start: chosen {average[0].mean():.2f}, rejected {average[1].mean():.2f} nats a token"
)
for beta in (0.1, 2.0, 10.0):
    print(f"beta {beta:4}: gamma = 0.5 asks for a gap of {0.5 / beta:.2f} nats a token")
tell(["words", "good", "no answer"], "simpo beta=2 lr=0.0001, only shorter chosen")
compare(["words", "good", "no answer"], SHORTER, "simpo beta=2 lr=0.0001, only shorter chosen")
compare(["words", "good", "no answer"], "simpo beta=2 lr=0.0001", "simpo beta=2 lr=0.0001, only shorter chosen")

# %% [markdown]
# An average is a small number: with DPO's beta of 0.1 the margin would have to be 5 nats *a token*. So SimPO takes 2 to 10, and
# no setting carries over from one loss to the other. On the same pairs fewer of its letters lack an action than DPO's (0.14
# ± 0.09 less), yet more than with all pairs: on this model normalisation shrinks the bias, it does not heal it.
#
# ## Labels without doubt: IPO
# DPO reached the optimum above because preferences were *noisy*. If one answer wins always, Bradley and Terry's reward
# difference is infinite, and so is DPO's margin: the leash is gone. IPO (2310.12036, equation 17) asks for a finite one:
# $$L = \Big(\log\tfrac{\pi(y_w)}{\pi_\text{ref}(y_w)} - \log\tfrac{\pi(y_l)}{\pi_\text{ref}(y_l)} - \tfrac{1}{2\tau}\Big)^2.$$
# ### Exercise 6.6 · IPO (5 minutes)


# %%
def ipo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, tau):
    """Squared distance of the margin of log-ratios from 1 / (2 tau). Returns as dpo_loss; rewards tau * log-ratio."""
    # BEGIN SOLUTION
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    loss = (chosen - rejected - 1 / (2 * tau)) ** 2
    return loss.mean(), tau * chosen.detach(), tau * rejected.detach()
    # END SOLUTION


ipo_loss = check.ipo_loss(ipo_loss)

# %%
even, always = torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
runs = {"DPO": lambda *logps: dpo_loss(*logps, 0.1), "IPO": lambda *logps: ipo_loss(*logps, 0.1)}
margins = {name: tabular.train(even, always, loss, steps=400)["margins"] for name, loss in runs.items()}
steps = list(range(0, 400, 8))
picture = plots.line(steps, {name: m[::8] for name, m in margins.items()},
                     "One answer wins always: IPO stops, DPO never", "step", "margin of log-ratios (nats)")  # fmt: skip
picture.set_size_inches(5.2, 2.7)
plots.show(
    picture, alt=f"After 400 steps DPO's margin is {margins['DPO'][-1]:.0f} and rising, IPO's {margins['IPO'][-1]:.1f}."
)
gap = (after - before)[0] - (after - before)[1]
means = ((after - before) / lengths)[0] - ((after - before) / lengths)[1]
print(f"IPO's loss of our trained policy, tau 0.1: sums {((gap - 5) ** 2).mean():.0f}, averages {((means - 5) ** 2).mean():.1f}; "
      "at the start 25 in both")  # fmt: skip
tell(["training loss"], "ipo beta=1 lr=0.0001")

# %% [markdown]
# A sum's margin grows with the length; in averages tau has another scale. TRL takes averages, as its authors do. So do the
# recorded runs, with tau 1: their loss, 0.25 at first, ended at 0.14: the target of half a nat a token was not reached.
#
# ### Wrong labels
# Now each training pair is swapped with probability 0.3. cDPO expects that: it smooths the labels, $-(1-\epsilon)\log\sigma(m) -
# \epsilon\log\sigma(-m)$, here with $\epsilon = 0.3$.

# %%
noisy = {name: f"{name} beta=1 lr=0.0001, flipped 0.3" for name in ("dpo", "cdpo", "ipo")}
tell(["good", "KL", "rejected change"], BETAS[1], noisy["dpo"], noisy["cdpo"], "ipo beta=1 lr=0.0001", noisy["ipo"])
IPO = "ipo beta=1 lr=0.0001"
compare(["good", "KL"], BETAS[1], noisy["dpo"], noisy["cdpo"])
compare(["good", "KL"], noisy["dpo"], noisy["cdpo"])
compare(["good", "KL"], IPO, noisy["ipo"])
flips = [sum(dpo_effects.pairs_of(dpo_effects.Setting(flipped=0.3), seed, 96)[1]) / 96 for seed in range(5)]
print("really swapped:", [f"{share:.0%}" for share in flips])
for name, share in (("DPO, 30 % flipped", 0.3), ("cDPO smooths them again", 0.7 * 0.3 + 0.3 * 0.7)):
    print(f"{name}: the loss is least at a margin of {math.log((1 - share) / share):.2f} / beta nats")

# %% [markdown]
# Wrong labels cost: DPO loses good letters in every seed (0.11 ± 0.08), and it learns less (KL 0.30 instead of 0.78), since its
# best margin is finite now. For IPO the loss is not apart. cDPO expects the noise and then brakes twice, as the last lines say:
# 0.21 ± 0.11 below clean DPO, and not apart from noisy DPO. A cure in expectation is robust DPO (2403.00409), which subtracts
# the flipped part; not measured here.
#
# ## Only thumbs: KTO
# Most feedback comes without a pair: a thumb up or down. KTO (2402.01306) asks whether a good answer gained *more than the
# policy drifted on average*: with the sample's $r = \log\frac{\pi}{\pi_\text{ref}}$ and the drift $z_0$,
# $$L = \lambda_D\,(1 - \sigma(\beta(r - z_0)))\ \text{if good}, \qquad \lambda_U\,(1 - \sigma(\beta(z_0 - r)))\ \text{if bad}.$$
# $z_0$ comes from answers under the *next* row's prompt, clamped at 0, without gradient (`kto_reference_point`).
# ### Exercise 6.7 · KTO (10 minutes)


# %%
def kto_loss(policy, reference, desirable, z0, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """policy, reference: (batch,) summed log-probabilities; desirable: bool (batch,); z0: scalar.

    Returns the mean of weight * (1 - sigmoid), and the rewards beta * log-ratio, detached, (batch,).
    """
    # BEGIN SOLUTION
    ratio = policy - reference
    gain = torch.where(desirable, ratio - z0, z0 - ratio)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return (weight * (1 - torch.sigmoid(beta * gain))).mean(), beta * ratio.detach()
    # END SOLUTION


kto_loss = check.kto_loss(kto_loss)

# %%
ratio, thumb, z0 = torch.tensor([2.0, -1.0, 1.0]), torch.tensor([True, True, False]), torch.tensor(0.8)
right = kto_loss(ratio, torch.zeros(3), thumb, z0, 0.1)[0]
noted = torch.where(thumb, torch.sigmoid(z0 - 0.1 * ratio), torch.sigmoid(0.1 * ratio - z0)).mean()
print(f"KTO {right:.4f}; a note's formula, beta left off z0: {noted:.4f}")
thumbs = as_thumbs(pairs[:18])
log = prefer.kto(copy.deepcopy(start), tokenizer, thumbs, steps=6, batch_size=6, lr=how["lr"], beta=1.0, warmup=3)
print("z0, step by step, nats:", [round(row["z0"], 2) for row in log])
tell(["good", "KL", "chosen change"], BETAS[1], "kto beta=1 lr=0.0001")
compare(["good", "KL"], BETAS[1], "kto beta=1 lr=0.0001")

# %% [markdown]
# KTO got half of the answers (half of these still had their partner among them), and is not apart from DPO on whole pairs.
# With few thumbs down raise $\lambda_U$; and a batch of one has no $z_0$.
#
# ## Which method when
# What was measured here, at the same rate and steps, each with one beta, none of them tuned:

# %%
family = {"DPO": BETAS[1], "IPO": "ipo beta=1 lr=0.0001", "SimPO": "simpo beta=2 lr=0.0001",
          "ORPO": "orpo beta=1 lr=0.0001", "KTO": "kto beta=1 lr=0.0001"}  # fmt: skip
tell(["good", "KL", "words", "story perplexity"], "start", *family.values())
compare(["good", "KL", "story perplexity"], BETAS[1], *list(family.values())[1:])

# %% [markdown]
# All five are far above the start. ORPO is apart from DPO, and better in every seed: it also imitates the chosen letter. The other
# three are not, in good letters. With one untuned beta each on one tiny model this is no ranking: choose by what you have.
#
# | you have | take | what the papers report (large models) | good here |
# |---|---|---|---|
# | clean pairs | DPO: sweep beta and rate first | 61 % against PPO's 57 % on summaries (2305.18290); tuned PPO above DPO (2404.10719) | 0.84 |
# | pairs with one obvious winner | IPO, or early stopping | no collapse on deterministic preferences (2310.12036) | 0.87 |
# | the same | hinge (SLiC-HF): no gradient beyond a margin of 1 | 2305.10425 | not run |
# | wrong labels, known share | robust DPO | unbiased under flips (2403.00409) | not run; cDPO 0.63 |
# | thumbs | KTO | equal to or above DPO from 1B to 30B (2402.01306) | 0.87 |
# | no room for a reference | adapter off (the base under a LoRA), or precomputed; else SimPO | up to 6.4 points on AlpacaEval 2 over DPO (2405.14734) | 0.87 |
# | no SFT model yet, one stage | ORPO: SFT loss plus odds ratio | 12.2 % on AlpacaEval 2 with Mistral-7B (2403.07691) | 0.91, after SFT |
# | a checker instead of pairs | GRPO and its kin: see the map | 2402.03300 | not run |
#
# ## A map of the rest
# The reinforcement-learning branch starts from the same objective, and samples: PPO with a reward model and a value model, GRPO
# without the value model, online DPO with fresh pairs (2402.04792); the judge may be people, a model with written rules
# (2212.08073), the policy itself (2401.10020) or a checker of steps (2305.20050). SPIN (2401.01335) has no judge: the SFT
# answer is chosen, the older self's rejected. A later lesson trains them;
# here are two formulas.

# %%
for ratio, advantage in ((1.5, 1.0), (0.5, 1.0), (1.5, -1.0)):
    clipped = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    print(f"PPO's surrogate at ratio {ratio}, advantage {advantage:+.0f}: {clipped:+.1f}")
for rewards_of_group in ([1.0] + [0.0] * 7, [9.0, 3.0, 1.5, 1.3], [9.0, 0.3, 0.2, 0.1]):
    group = torch.tensor(rewards_of_group)
    print(
        "GRPO's advantages of", rewards_of_group, [round(a, 2) for a in ((group - group.mean()) / group.std()).tolist()]
    )

# %% [markdown]
# PPO's loss is a clipped surrogate, not $\mathbb{E}[r - \beta\,\mathrm{KL}]$. GRPO's advantage is a z-score in the group, not
# a rank: the last two groups have one ranking and other advantages.
#
# ## The same with the library people use
# `trl.DPOTrainer`, ten lines. With a PEFT policy the reference is the same model with its adapter off: one copy in memory. First
# that this *is* the start, then three steps beside ours.

# %%
import tempfile

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from finetune_lab.methods import schedules

logging.set_verbosity_error()
disable_progress_bars()
args = DPOConfig(tempfile.mkdtemp(), beta=1.0, learning_rate=dpo_recipe.lora_lr, per_device_train_batch_size=6, max_steps=3,
                 lr_scheduler_type="linear", warmup_steps=0, logging_steps=1, report_to=[], save_strategy="no", seed=0,
                 max_length=None, disable_tqdm=True, bf16=False, use_cpu=start.device.type == "cpu")  # fmt: skip
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
trainer = DPOTrainer(copy.deepcopy(start), args=args, train_dataset=Dataset.from_list(pairs[:24]),
                     processing_class=tokenizer, peft_config=lora)  # fmt: skip
trainer.remove_callback(PrinterCallback)
ours = copy.deepcopy(trainer.model)
trainer.train()
defaults = DPOConfig(tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[])
print(f"defaults: rate {defaults.learning_rate:g}, beta {defaults.beta}, loss {defaults.loss_type}")

# %%
ids = inputs["input_ids"][:1]
with torch.no_grad(), trainer.model.disable_adapter():
    same = torch.equal(trainer.model(input_ids=ids).logits, start(input_ids=ids).logits)
print("adapter off is the start, bit for bit:", same)
mine = prefer.dpo(ours, tokenizer, pairs[:24], steps=3, batch_size=6, lr=dpo_recipe.lora_lr, beta=1.0, warmup=0,
                  reference="adapter off", schedule=schedules.linear, order=train.sampler_batches, seed=0)  # fmt: skip
theirs = [row for row in trainer.state.log_history if "loss" in row]
for a, b in zip(mine, theirs, strict=True):
    print(f"step {a['step']}: loss ours {a['loss']:.4f}, TRL {b['loss']:.4f}; chosen log-probability {a['chosen_logp']:.3f}, "
          f"{b['logps/chosen']:.3f}")  # fmt: skip
gap = max(abs(a["chosen_logp"] - b["logps/chosen"]) for a, b in zip(mine, theirs, strict=True))
print(f"largest difference of a log-probability: {gap:.1e} nats")

# %%
for kind in ("LoRA, ours, adapter off", "full, ours, precomputed"):
    for peer in ("trl", "textbook"):
        fast = bench.figure("dpo", f"{kind}: times faster than {peer}")
        bytes_ = bench.figure("dpo", f"{kind}: share of the extra bytes of {peer}")
        print(f"{kind}, against {peer}: {fast['ratio']:.1f} times faster, {bytes_['ratio']:.3f} of its extra bytes "
              f"(goal {bytes_['goal']}: {'met' if bytes_['holds'] else 'missed'})")  # fmt: skip

# %% [markdown]
# Ours and TRL's are one loss and one training. `label_smoothing` with `loss_type="sigmoid"` does nothing in TRL 1.16 (cDPO is
# not there); ORPO and SimPO live in `trl.experimental`; the trainer for PPO is gone. Ours does
# less work: only answers' tokens meet the head, a prompt is read once (`finetune-lab bench dpo`, recorded). When all weights
# train, our extra bytes are the tied matrix's two gradients.
#
# ## Myths
# What public notes get wrong, and where it is shown.
#
# | you may read | what is true | shown in |
# |---|---|---|
# | PPO's loss is −E[r − β KL] | that is the objective; the loss is a clipped surrogate | a map |
# | DPO needs two models in memory | one: adapter off, or log-probabilities computed once | library |
# | DPO raises the chosen answer | only the difference is paid | side effects |
# | accuracy 100 % means a good policy | the worst run has it too | beta |
# | beta = 0.1 is right for all losses | SimPO's is 2 to 10, and rate and beta go together | SimPO |
# | IPO on summed log-probabilities | a sum's margin grows with length; take averages | IPO |
# | KTO: σ(r_ref − β KL) | β before the whole difference, $r$ the sample's, $z_0$ the batch's | KTO |
# | GRPO uses the ranking in a group | the z-score of the rewards | a map |
# | GRPO and DPO are "RL at 5e-6" | DPO is no RL; no one rate fits: TRL's default is 1e-6, adapters take more | library |
# | PPO remains the ceiling; DPO has replaced PPO | both cannot hold: tuned PPO won in 2404.10719 | no cell here |
# | SFT teaches how to speak, RLHF what to say | knowledge is from pre-training; both move manner | no cell here |
# | DPO works on a base model as well | the pairs must be near the policy: SFT first | breaks in practice |
#
# ## What breaks in practice
# Four mistakes that raise no error, three steps each on the same pairs: what a log shows at once.


# %%
def forgotten(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """Someone left the reference out."""
    return dpo_loss(policy_chosen, policy_rejected, 0 * policy_chosen, 0 * policy_rejected, beta)


def three_steps(pairs_, **mistake) -> list[dict]:
    model = copy.deepcopy(start)
    mistake = {key: model if value == "itself" else value for key, value in mistake.items()}
    return prefer.dpo(model, tokenizer, pairs_, **({"steps": 3, "beta": 1.0, **how, "logps": pair_logps} | mistake))


swapped = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs[:18]]
logs = {"right": three_steps(pairs[:18]), "chosen and rejected swapped": three_steps(swapped),
        "reference forgotten": three_steps(pairs[:18], loss=forgotten),
        "reference is the policy itself": three_steps(pairs[:18], reference="itself"),
        "prompt counted": three_steps(pairs[:18], mask="all")}  # fmt: skip
for name, log in logs.items():
    print(f"{name:31} loss", [round(row["loss"], 3) for row in log], f"accuracy {log[-1]['accuracy']:.2f}",
          f"chosen log-probability at step 0 {log[0]['chosen_logp']:.0f}")  # fmt: skip

# %%
faulty = [f"{BETAS[1]}, {what}" for what in ("swapped", "forgotten", "identical", "no SFT")]
tell(["good", "accuracy", "KL", "training loss"], BETAS[1], *faulty, BETAS[0.1])
compare(["good", "KL"], BETAS[0.1], f"{BETAS[1]}, identical")
print(f"the base before training, seed 0: {letters.good_share(sampled(base), tested):.0%} good letters")
tell(["good", "KL", "training loss"], "simpo beta=2 lr=0.0001", "simpo beta=2 lr=0.0001, prompt counted")

# %% [markdown]
# Swapped labels give a log as good as the right one, and no good letter is left. The forgotten reference shows in the first
# number; here it cost no good letters that five seeds can see (0.84 ± 0.06).
# The identical reference keeps the loss at ln 2 and the log's accuracy at 0.50 (it compares with itself; 1.00 above is on
# held-out pairs against the true start), while the model moves. Without the brake it is the limit beta → 0: not apart
# from beta 0.1. A counted prompt cancels in DPO's difference of sums; in averages it dilutes the
# letter, and SimPO moves half as far (KL 0.49 against 0.87). And from the base model, which wrote no better, DPO
# reaches an accuracy of 100 % with 4 % good letters: the answers that it compares are not what it writes.
#
# | symptom | test | fix |
# |---|---|---|
# | loss does not start at ln 2 | step 0, one batch | the reference is missing or another model; dropout is on |
# | loss stays at ln 2, margin 0, model changes | KL to the true start | the reference is the policy: freeze a copy, adapter off, precompute |
# | everything perfect, letters worse | ten pairs read by hand; the rule on samples | chosen and rejected are swapped |
# | rewards or averages look odd, log-probabilities are far too low | labelled tokens of one row | count the answer only |
# | accuracy at 100 %, samples break off | KL, chosen log-probability, read samples | lower rate, larger beta, fewer steps |
# | letters ever shorter or longer | words of samples; how often is chosen longer? | balance pairs; averages; a length term (2403.19159) |
# | nothing works from the base model | how likely are the chosen answers? | SFT first |
# | SFT was an adapter, and "off" is the base | logits with the adapter off | merge first, or keep a frozen copy |
#
# ## Summary
# The objective of RLHF has a known optimum; read backwards it is a reward; put into Bradley and Terry it is a loss on two
# log-probabilities. It starts at ln 2, sees only a difference, and knows no end: watch samples, KL, both
# log-probabilities and length, not accuracy. The bill of the first page, on this tiny model: 16 steps on 96 pairs, half of the
# letters good before, 84 % ± 5 after, and the perplexity of stories up from 4.3 to 5.6.
#
# References: DPO 2305.18290; IPO 2310.12036; KTO 2402.01306; SimPO 2405.14734; ORPO 2403.07691; SLiC-HF 2305.10425; robust DPO
# 2403.00409; likelihood displacement 2410.08847; over-optimisation 2406.02900, 2210.10760; length 2403.19159; PPO against DPO
# 2404.10719; PPO 1707.06347; GRPO 2402.03300.
#
# Where next: `finetune-lab dpo` on your own pairs; lesson 07 merges models; lesson 12 has the reinforcement-learning branch.
# Drills: `finetune-lab drill --lesson 06`.
