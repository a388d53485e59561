"""Bench `dpo_effects`: what preference training does to the tiny model, for good and for ill, five seeds each.

The start is an SFT model that wrote as the shop did: half of its letters good, half rude, long or invented
(`lab.letters`). Every run trains a copy of it on pairs it has not seen and is then asked for sampled replies to
held-out tickets. Seeds change the start, the pairs, their order and the samples. A setting's rows are means over the
seeds, each with its standard deviation in a row of its own; the measures of `BY_SEED` have a row for every seed too.
All settings of a seed share its start, its pairs and its tickets, so two settings are compared seed by seed: `paired`.
No goals: whatever comes out is what the lesson says.
"""

import copy
import functools
import random
from collections import Counter
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, stdev

import torch
from tqdm import tqdm

from finetune_lab.course import bench
from finetune_lab.lab import letters, policy, prefer, tasks, train
from finetune_lab.lab.evaluate import general
from finetune_lab.lab.models import load
from finetune_lab.lab.pairs import as_pairs, as_thumbs, shared_pair_logps
from finetune_lab.lab.tiers import TINY
from finetune_lab.methods import preference

NAME = "dpo_effects"
HELP = "beta, rate, losses, noisy labels, length, mistakes: replies won, KL, log-probabilities, forgetting, five seeds"

UNITS = {"KL": "nats", "chosen change": "nats", "rejected change": "nats", "words": "words",
         "training loss": "nats", "story perplexity": "perplexity"}  # fmt: skip
BY_SEED = ("good", "KL", "chosen change", "words", "no answer", "distinct", "most common opening", "story perplexity",
           "sums kept")  # fmt: skip
T_95 = 2.776  # quantile 0.975 of Student's t, four degrees of freedom: five seeds
PROMPTS, EACH = 40, 2  # held-out tickets, replies sampled to each
BATCH = 6  # pairs a step


@dataclass(frozen=True)
class Setting:
    """One way to train. `only`: which pairs; `flipped`: share of swapped pairs; `mistake`: what is done wrong."""

    loss: str = "dpo"
    beta: float = 1.0
    lr: float = 1e-4
    only: str = "all"
    flipped: float = 0.0
    mistake: str = ""
    steps: int = 16

    @property
    def label(self) -> str:
        """The name of its rows, such as "dpo beta=1 lr=0.0001, flipped 0.3"."""
        if self.steps == 0:
            return "start"
        parts = [f"{self.loss} beta={self.beta:g} lr={self.lr:g}"]
        parts += [f"only {self.only}"] * (self.only != "all") + [f"flipped {self.flipped:g}"] * (self.flipped > 0)
        return ", ".join([*parts, self.mistake] if self.mistake else parts)


DPO = Setting()
LONGER, SHORTER = "longer chosen", "shorter chosen"  # the chosen reply has more, or fewer, words
SETTINGS = [
    Setting(steps=0),
    *(replace(DPO, beta=beta) for beta in (1, 0.1, 10)),
    replace(DPO, beta=0.1, lr=3e-4),
    *(replace(DPO, loss=loss, beta=beta) for loss, beta in (("kto", 1), ("simpo", 2), ("ipo", 1))),
    *(replace(DPO, flipped=0.3, loss=loss) for loss in ("dpo", "ipo", "cdpo")),
    replace(DPO, only=SHORTER),
    *(replace(DPO, mistake=what) for what in ("swapped", "identical", "no SFT")),
    replace(DPO, only=LONGER),
    replace(DPO, loss="simpo", beta=2, only=SHORTER),
    replace(DPO, loss="orpo"),
    replace(DPO, loss="simpo", beta=2, mistake="prompt counted"),
    replace(DPO, mistake="forgotten"),
]  # fmt: skip


def pairs_of(setting: Setting, seed: int, n: int) -> tuple[list[dict], list[bool]]:
    """`n` training pairs of a setting, its share of labels flipped; and which ones are."""
    pairs = clean_pairs(setting.only, seed, n)
    rng, share = random.Random(seed), 1.0 if setting.mistake == "swapped" else setting.flipped
    flips = [rng.random() < share for _ in pairs]
    swap = {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}
    return [{key: pair[swap[key]] for key in pair} if f else pair for pair, f in zip(pairs, flips, strict=True)], flips


def clean_pairs(only: str, seed: int, n: int) -> list[dict]:
    """The first `n` pairs of a seed of the wanted kind, labels right."""
    wanted = {"all": lambda item: True, LONGER: lambda item: _words(item) < 0, SHORTER: lambda item: _words(item) > 0}
    found = [item for item in tasks.load_task("reply", "train", 4 * n, 100 + seed) if wanted[only](item)]
    return as_pairs(found[:n])


@functools.cache
def reference_of(only: str, seed: int, n: int, sft: bool) -> torch.Tensor:
    """Log-probabilities (2, n) of `clean_pairs` under the model that training starts from."""
    model, tokenizer, *_ = start(seed, sft)
    return prefer.pair_logps_of(model, tokenizer, clean_pairs(only, seed, n))


def _words(item: dict) -> int:
    """Words of the rejected reply minus words of the chosen one."""
    return len(item["rejected"][0]["content"].split()) - len(item["completion"][0]["content"].split())


@functools.cache
def start(seed: int, sft: bool = True):
    """The SFT model of a seed (the base model itself without `sft`), with its tokenizer, its replies and its log-probabilities of held-out pairs."""
    model, tokenizer = load("tiny", seed=seed)
    recipe = TINY.recipes["reply"]
    items = letters.old_letters(tasks.load_task("reply", "train", recipe.items, seed), seed=seed)
    if sft:
        how = {"steps": recipe.steps, "batch_size": recipe.batch_size, "lr": recipe.full_lr}
        train.sft(model, tokenizer, items, seed=seed, **how)
    return model, tokenizer, *said_and_pairs(model, tokenizer, seed)


def said_and_pairs(model, tokenizer, seed: int):
    """Sampled replies to the held-out tickets, and the log-probabilities (2, n) of their pairs."""
    tested = tasks.load_task("reply", "test", PROMPTS)
    said = policy.sample(model, tokenizer, [item["prompt"] for item in tested], n=EACH, seed=seed)
    return said, prefer.pair_logps_of(model, tokenizer, as_pairs(tested))


def forgotten(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """The DPO loss of someone who left the reference out."""
    return preference.dpo_loss(policy_chosen, policy_rejected, 0 * policy_chosen, 0 * policy_rejected, beta)


def trained(setting: Setting, seed: int, model, tokenizer) -> list[dict]:
    """Train `model` by `setting`, in place; the history of its loop."""
    n = BATCH * setting.steps
    pairs, flips = pairs_of(setting, seed, n)
    how = {"steps": setting.steps, "lr": setting.lr, "beta": setting.beta, "seed": seed, "warmup": 3}
    if setting.loss == "kto":
        thumbs = as_thumbs(pairs)
        thumbs = random.Random(seed).sample(
            thumbs, len(thumbs) // 2
        )  # half of the answers: half of these lose their partner
        return prefer.kto(model, tokenizer, thumbs, batch_size=BATCH, **how)
    how |= {"batch_size": BATCH, "epsilon": setting.flipped, "logps": shared_pair_logps}
    if setting.mistake == "prompt counted":
        how |= {"mask": "all", "logps": prefer.pair_logps}
    elif setting.mistake == "identical":
        how["reference"] = model
    else:
        known = reference_of(setting.only, seed, n, setting.mistake != "no SFT")
        how["reference"] = torch.where(torch.tensor(flips), known.flip(0), known)
    how["loss"] = forgotten if setting.mistake == "forgotten" else setting.loss
    return prefer.dpo(model, tokenizer, pairs, **how)


def most_common_opening(said: list[list[str]]) -> float:
    """Share of the replies that begin with the same three words, for the most common three."""
    openings = Counter(" ".join(reply.split()[:3]) for group in said for reply in group)
    return openings.most_common(1)[0][1] / openings.total()


@functools.cache
def one_run(setting: Setting, seed: int) -> dict[str, float]:
    """Train once; what the policy says then, how far it moved, what it finds likely, what it forgot."""
    begun, tokenizer, said_before, logps_before = start(seed, setting.mistake != "no SFT")
    model = copy.deepcopy(begun)
    history = trained(setting, seed, model, tokenizer) if setting.steps else []
    tested = tasks.load_task("reply", "test", PROMPTS)
    said, logps = said_and_pairs(model, tokenizer, seed + 1000)  # the start is judged on two draws of its own
    rewards = preference.implicit_rewards(logps, logps_before, setting.beta)
    change = (logps - logps_before).mean(1)
    prompts = [item["prompt"] for item in tested]
    known = general(model, tokenizer, 30)
    return {
        "good": letters.good_share(said, tested),
        "win rate": letters.win_rate(said, said_before, tested),
        **letters.fault_shares(said, tested),
        "KL": policy.kl_to_reference(model, begun, tokenizer, prompts, seed=seed)["kl"] if history else 0.0,
        "accuracy": preference.reward_accuracy(*rewards, prefer.TIE).item(),
        "plain accuracy": preference.reward_accuracy(*logps).item(),
        "chosen change": change[0].item(),
        "rejected change": change[1].item(),
        "words": mean(len(reply.split()) for group in said for reply in group),
        "distinct": len({reply for group in said for reply in group}) / (PROMPTS * EACH),
        "most common opening": most_common_opening(said),
        "facts kept": known["facts"],
        "sums kept": known["sums"],
        "story perplexity": known["story_perplexity"],
        **({"training loss": mean(row["loss"] for row in history[-6:])} if history else {}),
    }


def run(quick: bool) -> list[dict]:
    """Rows: mean and standard deviation of every measure of every setting. quick: start and one setting, two seeds."""
    settings, seeds = (SETTINGS[:1] + [replace(DPO, steps=3)], range(2)) if quick else (SETTINGS, range(5))
    rows = []
    for setting in tqdm(settings, desc="settings", leave=False):
        runs = [one_run(setting, seed) for seed in seeds]
        for measure in runs[0]:
            for what, summary in (("", mean), (", standard deviation", stdev)):
                value = summary(one[measure] for one in runs)
                rows.append(
                    {"name": f"{setting.label}: {measure}{what}", "value": value, "unit": UNITS.get(measure, "1")}
                )
            if measure in BY_SEED:
                rows += [{"name": f"{setting.label}: {measure}, seed {seed}", "value": one[measure],
                          "unit": UNITS.get(measure, "1")} for seed, one in zip(seeds, runs, strict=True)]  # fmt: skip
    return rows


def paired(first: str, second: str, measure: str) -> tuple[float, float]:
    """Recorded difference of two settings seed by seed, `first` minus `second`: its mean, and half of its 95 % t-interval.

    first, second: labels of settings; measure: one of BY_SEED. Apart if the mean is larger in size than the half width.
    """
    values = {row["name"]: row["value"] for row in bench.recorded(NAME)["rows"]}
    a, b = ([values[f"{label}: {measure}, seed {seed}"] for seed in range(5)] for label in (first, second))
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return mean(gaps), T_95 * stdev(gaps) / sqrt(5)
