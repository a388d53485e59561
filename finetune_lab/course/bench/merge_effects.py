"""Bench `merge_effects`: what each way of merging keeps of three skills, on the tiny model, five seeds.

Three specialists of one base a seed (`extract`, `answer`, `math`), fully tuned and with LoRA; the same items in the same
number of steps in ONE full training (joint) are the ceiling. Every merge is scored on 40 held-out items a skill: exact match,
and "kept", its mean over the skills as a share of the specialists' own. Sweeps of scale, density and drop rate are on
test items; where a row says "chosen", the scale was chosen on 20 validation items a skill, and only then tested.
Further: averages of two runs of one task (soups), SLERP, the line to a model with permuted hidden units, subtraction,
merging on a 4-bit grid, and up to ten models that each know 24 codes (one pool; the spread is over which are merged).
Each row is a mean over the seeds, with its standard deviation in a row of its own; rows "A minus B" are paired
differences with half of their 95 % t-interval (`course.merge_paired`). No goals: whatever comes out is what the lesson says.
"""

import math
import random
from collections.abc import Iterable
from itertools import combinations
from statistics import mean, stdev

import torch
from tqdm import tqdm

from finetune_lab.course.bench.lora_effects import codes
from finetune_lab.course.merge_paired import differences
from finetune_lab.course.merge_specialists import SKILLS, base, joint, known, score, specialist, stories, train_one
from finetune_lab.course.merge_ways import (
    Weights,
    adapter_ways,
    families,
    four_bit_ways,
    interference,
    onto_base,
    permuted,
    tensorwise,
)
from finetune_lab.lab import forced
from finetune_lab.lab.meter import one_thread
from finetune_lab.methods import merging
from finetune_lab.methods.inject import find_targets

NAME = "merge_effects"
HELP = "what merges keep of three skills: methods, scale, density, drop rate, bases, adapters, five seeds"

KINDS = ("full", "LoRA")
LAMS = (1 / 3, 0.5, 0.7, 1.0, 1.5, 2.0)
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
DROPS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
LINE = tuple(i / 10 for i in range(11))


def swept(specialists: list[Weights], seed: int, n: int, lams: Iterable[float]) -> dict[str, dict[str, float]]:
    """Test scores of every family at every scale, and of the scale that was best on validation items."""
    out = {}
    for name, family in families(seed).items():
        merged_task_vector = onto_base(
            base()[2], family, specialists
        )  # lam = 1; other scales lie on its line through the base
        best = (-1.0, 0.0)
        for lam in lams:
            weights = tensorwise(lambda b, m, lam=lam: b + lam * (m - b), base()[2], merged_task_vector)
            tested, tuned = score(weights, seed, n), score(weights, seed, n // 2, "validation")
            out[f"{name} lam={lam:.2g}"] = tested
            if (value := mean(tuned[s] for s in SKILLS) - 1e-3 * tuned["loss"]) > best[0]:
                best, chosen = (value, lam), tested | {"story perplexity": stories(weights, seed, n)}
        out[f"{name} chosen"] = chosen | {"lam": best[1]}
    return out


def methods(kind: str, seed: int, n: int, share: float, quick: bool) -> dict[str, dict[str, float]]:
    """Scores of specialists, merges and (full only) joint training of one kind, by name."""
    trained = {skill: specialist(kind, skill, seed, share) for skill in SKILLS}
    own = {skill: weights for skill, (weights, _) in trained.items()}
    three = list(own.values())
    out = {f"specialist {skill}": score(weights, seed, n) for skill, weights in own.items()}
    out |= {f"specialist {s}": out[f"specialist {s}"] | {"story perplexity": stories(own[s], seed, n)} for s in SKILLS}
    if kind == "full":
        ceiling = joint(seed, share)
        out["joint"] = score(ceiling, seed, n) | {"story perplexity": stories(ceiling, seed, n)}
    out |= swept(three, seed, n, LAMS[1:3] if quick else LAMS)
    for density in DENSITIES[:1] if quick else DENSITIES:
        weights = onto_base(base()[2], lambda taus, d=density: merging.ties(taus, d), three)
        out[f"TIES density={density}"] = score(weights, seed, n)
    dice = torch.Generator().manual_seed(seed)
    for p in DROPS[:1] if quick else DROPS:
        weights = onto_base(base()[2], lambda taus, p=p: merging.dare_linear(taus, p, generator=dice), three, 0.5)
        out[f"DARE p={p} lam=0.5"] = score(weights, seed, n)
    if kind == "LoRA":
        linears = {f"{path}.weight" for path in find_targets(base()[0], "all-linear")}
        out |= {name: score(w, seed, n) for name, w in adapter_ways(base()[2], [trained[s][1] for s in SKILLS]).items()}
        out |= {name: score(w, seed, n) for name, w in four_bit_ways(base()[2], three, linears).items()}
    for scores in out.values():
        ratios = [scores[s] / max(out[f"specialist {s}"][s], 1e-9) for s in SKILLS]
        scores["kept"] = mean(ratios)
    return out


def drop_own(kind: str, seed: int, n: int, share: float, drops: Iterable[float]) -> dict[str, dict[str, float]]:
    """Each specialist alone after DARE, on its own skill: how much of a change is redundant."""
    out, dice = {}, torch.Generator().manual_seed(seed)
    for p in drops:
        found = {}
        for skill in SKILLS:
            tuned = [specialist(kind, skill, seed, share)[0]]
            weights = onto_base(base()[2], lambda taus, p=p: merging.dare(taus[0], p, dice), tuned)
            found[skill] = score(weights, seed, n, skills=[skill])[skill]
        out[f"alone, DARE p={p}"] = found
    return out


def pairs(kind: str, seed: int, n: int, share: float) -> dict[str, dict[str, float]]:
    """Two specialists half and half: straight, on the arc, and on the arc of their task vectors; soups of one skill."""
    out, origin = {}, base()[2]
    for a, b in combinations(SKILLS, 2):
        both = [specialist(kind, skill, seed, share)[0] for skill in (a, b)]
        half = tensorwise(lambda x, y: merging.linear([x, y]), *both)
        arc = tensorwise(lambda x, y: merging.slerp(x, y, 0.5), *both)
        vectors = onto_base(base()[2], lambda taus: merging.slerp(taus[0], taus[1], 0.5), both)
        for name, weights in {"linear": half, "SLERP": arc, "SLERP of task vectors": vectors}.items():
            found = score(weights, seed, n, skills=(a, b))
            out[f"{a} and {b}, {name}"] = {"exact match": mean(found[s] for s in (a, b))}
        gap = math.sqrt(sum((half[k] - arc[k]).square().sum().item() for k in half))
        size = math.sqrt(sum((half[k] - origin[k]).square().sum().item() for k in half))
        out[f"{a} and {b}, SLERP"]["distance from linear over the update"] = gap / size
        out[f"{a} and {b}"] = interference(base()[2], both)
    for skill in ("answer", "math"):
        two = [specialist(kind, skill, each, share)[0] for each in (seed, seed + 100)]
        soup = tensorwise(lambda x, y: merging.linear([x, y]), *two)
        out[f"{skill}, soup of two runs"] = {
            "exact match": score(soup, seed, n, skills=[skill])[skill],
            "exact match of one": mean(score(each, seed, n, skills=[skill])[skill] for each in two),
        }
    return out


def lines(seed: int, n: int, share: float, ts: Iterable[float]) -> dict[str, dict[str, float]]:
    """Loss on one skill along straight lines: to another run of it, to another skill, to a permuted twin of itself."""
    out = {}
    one, again, other = (specialist("full", skill, each, share)[0] for skill, each in
                         (("answer", seed), ("answer", seed + 100), ("extract", seed)))  # fmt: skip
    for name, end in {"another run": again, "extract": other, "its permuted twin": permuted(one, seed)}.items():
        for t in ts:
            weights = tensorwise(lambda x, y, t=t: (1 - t) * x + t * y, one, end)
            out[f"answer to {name}, t={t:g}"] = {"loss": score(weights, seed, n, skills=["answer"])["loss"]}
    return out


def subtraction(seed: int, n: int, share: float, lams: Iterable[float]) -> dict[str, dict[str, float]]:
    """The task vector of `math` taken out of the joint model, and out of the base."""
    origin, taught = base()[2], joint(seed, share)
    tau = tensorwise(merging.task_vector, specialist("full", "math", seed, share)[0], origin)
    out = {}
    for lam in lams:
        weights = tensorwise(lambda w, v, lam=lam: merging.apply(w, v, -lam), taught, tau)
        out[f"joint - {lam:g} math"] = score(weights, seed, n) | known(weights, seed, n)
        out[f"base - {lam:g} math"] = known(
            tensorwise(lambda w, v, lam=lam: merging.apply(w, v, -lam), origin, tau), seed, n
        )
    return out


def many(counts: Iterable[int], steps: int) -> dict[str, list[dict[str, float]]]:
    """Models that each know 24 codes of their own, merged by 1, 2, 3, 5 and 10: the share of the codes still known.

    One pool of models; a list has one entry for each of five draws of which are merged (and of DARE's dice). lam is
    the best of a sweep on the very codes that are counted: an upper bound for each method.
    """
    most = max(counts)
    asked = codes(24 * most, seed=0)
    sets = [asked[24 * i : 24 * (i + 1)] for i in range(most)]
    models = [train_one("full", items, steps, 1e-3, seed)[0] for seed, items in enumerate(sets)]
    model, tokenizer, origin = base()
    out: dict[str, list[dict[str, float]]] = {}
    for count in counts:
        for draw in range(5):
            chosen = random.Random(draw).sample(range(most), count)
            items = [item for i in chosen for item in sets[i]]
            for name in ("task arithmetic", "TIES 0.2", "DARE 0.9"):
                merged = onto_base(origin, families(draw)[name], [models[i] for i in chosen])
                found = []
                for lam in (0.2, *LAMS[:-1]):
                    forced.put_weights(model, tensorwise(lambda b, m, lam=lam: b + lam * (m - b), origin, merged))
                    found.append(forced.scores(model, tokenizer, items)["exact_match"])
                out.setdefault(f"{count} models, {name}", []).append({"codes known": max(found)})
    return out


def one_seed(seed: int, n: int, share: float, quick: bool) -> dict[str, dict[str, float]]:
    """Everything but `many` for one seed, by name."""
    out = {"base": score(base()[2], seed, n) | known(base()[2], seed, n)}
    for kind in KINDS[:1] if quick else KINDS:
        found = methods(kind, seed, n, share, quick) | drop_own(kind, seed, n, share, DROPS[:1] if quick else DROPS)
        out |= {f"{kind}, {name}": scores for name, scores in found.items()}
    out |= {f"full, {name}": scores for name, scores in pairs("full", seed, n, share).items()}
    out |= lines(seed, n, share, (0, 0.5, 1) if quick else LINE)
    return out | subtraction(seed, n, share, (1,) if quick else (0.25, 0.5, 0.75, 1))


def _rows(name: str, runs: list[dict[str, float]]) -> list[dict]:
    """For each measure a row with the mean and one with the standard deviation."""
    rows = []
    for measure in runs[0]:
        for what, summary in (("", mean), (", standard deviation", stdev)):
            unit = {"loss": "nats", "story perplexity": "perplexity"}.get(measure, "1")
            value = summary(run[measure] for run in runs)
            rows.append({"name": f"{name}: {measure}{what}", "value": value, "unit": unit})
    return rows


@one_thread()
def run(quick: bool) -> list[dict]:
    """Rows as the module says. quick: two seeds, a third of the steps, few items, full fine-tuning only, two models."""
    seeds, n, share = (range(2), 8, 1 / 3) if quick else (range(5), 40, 1.0)
    runs = [one_seed(seed, n, share, quick) for seed in tqdm(seeds, desc="seeds", leave=False)]
    rows = [row for name in runs[0] for row in _rows(name, [each[name] for each in runs])]
    for name, (gap, half) in differences(runs).items():
        unit = "perplexity" if name.endswith("perplexity") else "1"
        rows += [{"name": name, "value": gap, "unit": unit}]
        rows += [{"name": f"{name}, half of the 95 % interval", "value": half, "unit": unit}]
    pool = many((1, 2), 5) if quick else many((1, 2, 3, 5, 10), 60)
    return rows + [row for name, draws in pool.items() for row in _rows(name, draws)]
