"""Paired differences of bench `merge_effects`: which of two ways is better, seed by seed.

Both ways of a pair start from the same specialists and answer the same items, so the difference of one seed says more
than two means with their spreads. Told are the mean difference and half of its 95 % t-interval; "apart" means that the
interval leaves out 0. Not apart is not equal: the interval says how large a difference may still be. About one in
twenty pairs that do not differ looks apart by chance. Leaves out: any correction for the number of pairs.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import mean, stdev

SKILLS = ("extract", "answer", "math")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by the number of seeds
CHOSEN = [f"{way} chosen" for way in ("task arithmetic", "TIES 0.2", "TIES 0.5", "DARE 0.9", "DARE-TIES 0.9")]
COUPLES = ("extract and answer", "extract and math", "answer and math")
SUM = "full, task arithmetic lam=0.5"
EXACT = "LoRA, task arithmetic lam=0.5"
PAIRS: list[tuple[str, str, str]] = [
    *((f"{kind}, {way}", f"{kind}, {CHOSEN[0]}", "kept") for kind in ("full", "LoRA") for way in CHOSEN[1:]),
    *((f"full, {way}", "full, task arithmetic lam=0.33", "kept") for way in CHOSEN),
    *(("full, joint", f"full, {way}", measure) for way in CHOSEN for measure in ("kept", "story perplexity")),
    *((f"full, {way}", f"LoRA, {way}", "kept") for way in CHOSEN),
    *((SUM, "full, task arithmetic lam=0.33", skill) for skill in SKILLS),
    *((f"full, task arithmetic lam={lam}", SUM, skill) for lam in ("0.7", "1") for skill in SKILLS),
    *((f"full, TIES {density} lam=1", SUM, "kept") for density in ("0.2", "0.5")),
    *(("full, TIES density=0.5", f"full, TIES density={density}", "kept") for density in ("0.2", "1.0")),
    *((f"full, {two}, SLERP of task vectors", f"full, {two}, linear", "exact match") for two in COUPLES),
    *((f"full, alone, DARE p={p}", f"full, specialist {s}", s) for p in (0.9, 0.98, 0.99) for s in SKILLS),
    *((f"full, alone, DARE p={p}", f"LoRA, alone, DARE p={p}", s) for p in (0.95, 0.98, 0.99) for s in SKILLS),
    *((f"full, DARE p={p} lam=0.5", SUM, "kept") for p in (0.9, 0.98, 0.99)),
    *((f"LoRA, adapters {way} lam=0.5", EXACT, "kept") for way in ("svd", "linear", "factors by TIES")),
    *((f"LoRA, {way}", EXACT, "kept") for way in ("merged, then NF4", "on the NF4 base", "on the NF4 base, then NF4")),
    *((f"base - {lam} math", "base", "sums") for lam in ("0.5", "1")),
]


def title(one: str, other: str, measure: str) -> str:
    """The row of a pair in the record."""
    return f"{one} minus {other}: {measure}"


def differences(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, tuple[float, float]]:
    """Row -> (mean of one minus other over the seeds, half of its 95 % interval), for each of PAIRS that was run.

    runs: one for each seed, row name -> measure -> value.
    """
    out = {}
    for one, other, measure in PAIRS:
        if one in runs[0] and other in runs[0]:
            gaps = [run[one][measure] - run[other][measure] for run in runs]
            out[title(one, other, measure)] = mean(gaps), T_95[len(gaps)] * stdev(gaps) / sqrt(len(gaps))
    return out
