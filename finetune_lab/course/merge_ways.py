"""Whole models merged, name by name: what bench `merge_effects` and lesson 07 do with the methods of one tensor.

A model is a dict of weights by name (`lab.forced.weights_of`), its adapters a dict of `merging.Adapter` by path. Every
function here returns new weights and changes none.
Leaves out: models larger than memory, files and their checks (`finetune-lab merge`).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from finetune_lab.methods import merging
from finetune_lab.methods.codebooks import nf4_code, round_trip

Weights = dict[str, Tensor]
Adapters = dict[str, merging.Adapter]


def tensorwise(combine: Callable[..., Tensor], *models: Weights) -> Weights:
    """`combine` applied to the models' tensors of one name, for every name."""
    return {name: combine(*(model[name] for model in models)) for name in models[0]}


def onto_base(
    base: Weights, merge: Callable[[list[Tensor]], Tensor], specialists: Sequence[Weights], lam: float = 1.0
) -> Weights:
    """base + lam * merge(task vectors of the specialists), tensor by tensor."""

    def combine(origin: Tensor, *tuned: Tensor) -> Tensor:
        return merging.apply(origin, merge([merging.task_vector(each, origin) for each in tuned]), lam)

    return tensorwise(combine, base, *specialists)


def families(seed: int) -> dict[str, Callable[[list[Tensor]], Tensor]]:
    """Ways to make one task vector from several; each is swept over its scale lam."""

    one, two = (torch.Generator().manual_seed(seed) for _ in range(2))
    return {
        "task arithmetic": merging.task_arithmetic,
        "TIES 0.2": lambda taus: merging.ties(taus, 0.2),
        "TIES 0.5": lambda taus: merging.ties(taus, 0.5),
        "DARE 0.9": lambda taus: merging.dare_linear(taus, 0.9, generator=one),
        "DARE-TIES 0.9": lambda taus: merging.dare_ties(taus, 0.9, generator=two),
    }


def adapter_ways(base: Weights, adapters: Sequence[Adapters]) -> dict[str, Weights]:
    """Merges of adapters, at scale 0.5: of the updates (exact, and cut to rank 16), and of the factors, as peft does."""

    def factors_by_ties(some: list[merging.Adapter], _) -> merging.Adapter:
        roots = [math.sqrt(0.5 * a.scaling) for a in some]
        A, B = (merging.ties([root * x[f] for root, x in zip(roots, some, strict=True)], 0.5) for f in (0, 1))
        return merging.Adapter(A, B)

    ways = {
        "adapters cat lam=0.5": merging.concatenate,
        "adapters svd lam=0.5": merging.svd,
        "adapters linear lam=0.5": merging.linear_factors,
        "adapters factors by TIES lam=0.5": factors_by_ties,
    }
    out = {}
    for name, way in ways.items():
        weights = dict(base)
        for path in adapters[0]:
            update = merging.update(way([each[path] for each in adapters], [0.5] * len(adapters)))
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + update
        out[name] = weights
    return out


def four_bit_ways(base: Weights, specialists: Sequence[Weights], rounded: set[str]) -> dict[str, Weights]:
    """The sum of the task vectors at scale 0.5 and NF4: rounded once after merging, or added to a rounded base.

    rounded: the names of the weights that NF4 takes.
    """

    def nf4(weights: Weights) -> Weights:
        return {k: round_trip(w, nf4_code(), 64).to(w.dtype) if k in rounded else w for k, w in weights.items()}

    merged = onto_base(base, merging.task_arithmetic, specialists, 0.5)
    on_grid = nf4(base)
    beside = {k: on_grid[k] + (merged[k] - base[k]) for k in merged}
    return {"merged, then NF4": nf4(merged), "on the NF4 base": beside, "on the NF4 base, then NF4": nf4(beside)}


def interference(base: Weights, models: Sequence[Weights]) -> dict[str, float]:
    """Cosine of two task vectors, sign conflicts of all entries and after trimming to 0.2, and their size."""
    taus = [{k: merging.task_vector(model[k], base[k]) for k in base} for model in models]
    moved = [k for k in base if all(tau[k].any() for tau in taus)]
    flat = [torch.cat([tau[k].flatten() for k in moved]) for tau in taus]
    trimmed = [torch.cat([merging.trim(tau[k], 0.2).flatten() for k in moved]) for tau in taus]
    return {
        "cosine": torch.cosine_similarity(*flat, dim=0).item(),
        "sign conflicts": merging.sign_conflicts(flat),
        "sign conflicts after trimming": merging.sign_conflicts(trimmed),
    }


def permuted(weights: Weights, seed: int) -> Weights:
    """The same function in other coordinates: the hidden units of every feed-forward layer in another order."""
    dice, out = torch.Generator().manual_seed(seed), dict(weights)
    for name in weights:
        if name.endswith("gate_proj.weight"):
            order = torch.randperm(len(weights[name]), generator=dice)
            up, down = (name.replace("gate_proj", other) for other in ("up_proj", "down_proj"))
            out |= {name: weights[name][order], up: weights[up][order], down: weights[down][:, order]}
    return out
