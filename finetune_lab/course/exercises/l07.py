"""The exercises of lesson 07, model merging: what people get wrong, and the hint for each mistake.

The wrong answers come from public notes (signs counted instead of summed, trimming that loses the signs, only positions
without a conflict, p as a percentage, averaged A and B) and from first implementations.
"""

import math

import torch

from finetune_lab.course.checks import Wrong, case, exercise
from finetune_lab.methods.merging.adapters import Adapter, concatenate, update
from finetune_lab.methods.merging.dare import dare
from finetune_lab.methods.merging.linear import NEARLY_PARALLEL, arc, task_arithmetic
from finetune_lab.methods.merging.ties import disjoint_mean, elect_sign, trim

# 07.1 task_arithmetic


def vector_lists(draw):
    for models, shape in zip((2, 3, 4), draw.sizes(3, 3, 8), strict=True):
        weights = [draw.choice([0.3, 0.5, 1.5]) for _ in range(models - 1)] + [-0.7]
        yield case([draw.normal(*shape) for _ in range(models)], weights)
    yield case([draw.normal(5, 3) for _ in range(3)], None)
    yield case([draw.normal(6, 4, dtype=torch.bfloat16) for _ in range(3)], [0.1, 0.7, 0.3])


def summed(share=False, absolute=False, blind=False, narrow=False):
    """`task_arithmetic` with one mistake."""

    def task_arithmetic(task_vectors, weights=None):
        w = [1.0] * len(task_vectors) if weights is None or blind else [abs(x) if absolute else x for x in weights]
        total = sum(x * (tau if narrow else tau.float()) for x, tau in zip(w, task_vectors, strict=True))
        return total / {"models": len(w), "weights": sum(w), False: 1}[share]

    return task_arithmetic


exercise(
    "07.1", "task arithmetic", task_arithmetic, vector_lists,
    wrong=[
        Wrong(summed(share="models"), "this is the average: task arithmetic adds, and leaves the scale to the weights"),
        Wrong(summed(share="weights"), "do not divide by the sum of the weights: a weight of -1 must be able to subtract"),
        Wrong(summed(absolute=True), "a negative weight takes a skill out: keep its sign"),
        Wrong(summed(blind=True), "each task vector has its weight: multiply by it before adding"),
        Wrong(summed(narrow=True), "bf16 keeps 8 bits: make each task vector wide() before adding"),
    ],
)  # fmt: skip


# 07.2 arc


def angle_cases(draw):
    for cosine, t in ((0.3, 0.25), (-0.6, 0.7), (0.0, 0.5), (0.9, draw.uniform(0.2, 0.4))):
        norms = draw.uniform(0.4, 0.9)
        yield case(cosine * norms, norms, t)
    yield case(-0.8 * 9.0, 9.0, 0.3)
    yield case(0.9998 * 4.0, 4.0, 0.3)
    yield case(-0.9999 * 4.0, 4.0, 0.2)
    yield case(0.0, 0.0, 0.6)


def on_arc(cosine=lambda dot, norms: dot / norms, guard=lambda c: abs(c) > NEARLY_PARALLEL, swap=False, share=False,
           zero=True):  # fmt: skip
    """`arc` with one mistake."""

    def arc(dot, norms, t):
        if zero and norms == 0:
            return 1 - t, t
        c = cosine(dot, norms)
        if guard(c):
            return 1 - t, t
        angle = math.acos(c)
        a, b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        a, b = (b, a) if swap else (a, b)
        return (a / (a + b), b / (a + b)) if share else (a, b)

    return arc


def sines(dot, norms, t):
    angle = 0.0 if norms == 0 else math.acos(dot / norms)
    if norms == 0 or abs(math.cos(angle)) > NEARLY_PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * angle), math.sin(t * angle)


def straight(dot, norms, t):
    return 1 - t, t


exercise(
    "07.2", "weights on an arc", arc, angle_cases, rtol=1e-6, atol=1e-7,
    wrong=[
        Wrong(straight, "this is the straight line: weight the two with sines of the angle"),
        Wrong(sines, "divide both sines by sin(angle): at t = 0 the weight of a must be 1"),
        Wrong(on_arc(swap=True), "the ends are mixed up: t = 0 gives a, t = 1 gives b"),
        Wrong(on_arc(cosine=lambda dot, norms: dot), "the cosine is the dot product divided by both norms"),
        Wrong(on_arc(share=True), "do not normalise: on an arc the two weights may add up to more than 1"),
        Wrong(on_arc(guard=lambda c: c > NEARLY_PARALLEL), "opposite vectors have sin(angle) near 0 too: compare |cosine|"),
        Wrong(on_arc(guard=lambda c: False), "nearly parallel vectors need the straight line: sin(angle) is near 0"),
        Wrong(on_arc(zero=False), "a zero tensor has no direction (norms is 0): take the straight line"),
    ],
)  # fmt: skip


# 07.3 trim


def trim_cases(draw):
    for density, shape in zip((0.2, 0.5, 0.35), draw.sizes(3, 5, 9), strict=True):
        yield case(draw.normal(*shape), density)
    yield case(draw.normal(7, 3), 1.0)
    yield case(torch.tensor([-1.0, 0.2, 0.1, -0.05, 0.0]), 0.4)
    yield case(draw.normal(3, 5), 0.25)  # 3.75 entries: 3
    yield case(draw.normal(8, 6).sign(), 0.5)  # all alike: the first in memory stay
    yield case(draw.normal(2, 2), 0.2)  # 0.8 entries: none
    yield case(draw.normal(3, 7), 0.3)  # 6.3 entries: 6


def kept(
    score=lambda tau: tau.abs(), k=lambda density, n: int(density * n), rows=False, after=lambda kept, density: kept
):
    """`trim` with one mistake."""

    def trim(task_vector, density):
        flat = score(task_vector).reshape(len(task_vector), -1) if rows else score(task_vector).reshape(1, -1)
        order = flat.argsort(dim=1, descending=True, stable=True)[:, : k(density, flat.shape[1])]
        mask = torch.zeros_like(flat).scatter_(1, order, 1.0).view_as(task_vector)
        return after(task_vector * mask, density)

    return trim


def by_rank_value(task_vector, density):
    sizes = task_vector.abs()
    return task_vector * (sizes >= sizes.flatten().sort(descending=True).values[int(density * sizes.numel()) - 1])


def by_threshold(task_vector, density):
    return task_vector * (task_vector.abs() > density)


exercise(
    "07.3", "trim", trim, trim_cases,
    wrong=[
        Wrong(kept(after=lambda out, density: out.abs()), "keep the entries with their signs: magnitudes alone would all "
              "elect plus"),
        Wrong(kept(score=lambda tau: tau), "largest in MAGNITUDE: a change of -1 is larger than one of 0.2"),
        Wrong(kept(score=lambda tau: -tau.abs()), "the largest entries are kept, the smallest become zero"),
        Wrong(kept(k=lambda density, n: n - int(density * n)), "density is the share that is KEPT, not the share dropped"),
        Wrong(kept(k=lambda density, n: math.ceil(density * n)), "int(density * n) entries stay: round down"),
        Wrong(kept(k=lambda density, n: round(density * n)), "round down, not to the nearest: int(density * n)"),
        Wrong(by_rank_value, "comparing with the k-th largest value keeps ALL that equal it, and some where k is 0: keep the "
              "first k of a stable sort"),
        Wrong(kept(rows=True), "the whole tensor is ranked at once, not row by row"),
        Wrong(kept(after=lambda out, density: out / density), "TIES does not rescale what it keeps (DARE does)"),
        Wrong(by_threshold, "density is a share of the entries, not a threshold for their size"),
    ],
)  # fmt: skip


# 07.4 elect_sign


def stacks(draw):
    for models, shape in zip((2, 3, 5), draw.sizes(3, 4, 8), strict=True):
        values = draw.normal(models, *shape)
        yield case(values * (draw.normal(models, *shape).abs() > 0.5))  # trimmed: with zeros
    yield case(torch.tensor([[1.0, -2, 0.5, 0, -1], [-0.3, 0.3, -0.5, 0, 0], [-0.3, 0.3, 0, 0, 0]]))
    yield case(torch.tensor([[5.0, 3.0], [-3.0, -2.0], [-3.0, 0.0]]))  # the largest is outvoted by the sum


def votes(task_vectors):
    return torch.where(task_vectors.sign().sum(0) >= 0, 1, -1)


def undecided(task_vectors):
    return task_vectors.sum(0).sign()


def strictly(task_vectors):
    return torch.where(task_vectors.sum(0) > 0, 1, -1)


def by_the_majority(task_vectors):
    total = task_vectors.sum(0)
    sign = total.sign()
    return torch.where(sign == 0, torch.where(sign.sum() >= 0, 1.0, -1.0), sign)


def loudest(task_vectors):
    rank = task_vectors.abs().argmax(0, keepdim=True)
    return torch.where(task_vectors.gather(0, rank)[0] >= 0, 1, -1)


def first_model(task_vectors):
    return torch.where(task_vectors[0] >= 0, 1, -1)


def one_for_all(task_vectors):
    return torch.where(task_vectors.sum() >= 0, 1, -1).expand(task_vectors.shape[1:])


exercise(
    "07.4", "elect a sign", elect_sign, stacks, call=lambda fn, task_vectors: fn(task_vectors).float(),
    wrong=[
        Wrong(votes, "this counts votes: add the VALUES, then take the sign (one large change outvotes two small ones)"),
        Wrong(undecided, "a sum of exactly 0 elects plus: torch.sign gives 0 there"),
        Wrong(strictly, "a sum of exactly 0 elects plus: compare with >= 0, not with > 0"),
        Wrong(by_the_majority, "a sum of exactly 0 elects plus here, whatever the other entries elect"),
        Wrong(loudest, "the largest entry does not decide alone: take the sign of the sum"),
        Wrong(first_model, "all models take part: sum over the first dimension"),
        Wrong(one_for_all, "one sign for each entry: sum over the models only"),
    ],
)  # fmt: skip


# 07.5 disjoint_mean


def elected_cases(draw):
    for one in stacks(draw):
        values = one.args[0]
        yield case(values, torch.where(values.sum(0) >= 0, 1, -1))
    yield case(torch.tensor([[-1.0, 2.0, 4.0], [-3.0, 0.0, 2.0], [0.0, 0.0, -1.0]]), torch.tensor([1, -1, 1]))


def among(agree=lambda x, sign: x.sign() == sign, by="agreeing", only=None):
    """`disjoint_mean` with one mistake."""

    def disjoint_mean(task_vectors, sign):
        agrees = agree(task_vectors, sign)
        if only is not None:
            agrees = agrees & only(task_vectors)
        counts = {
            "agreeing": agrees.sum(0).clamp(min=1),
            "bare": agrees.sum(0),
            "models": len(task_vectors),
            "present": (task_vectors != 0).sum(0).clamp(min=1),
            "one": 1,
        }
        return (task_vectors * agrees).sum(0) / counts[by]

    return disjoint_mean


def no_conflict(task_vectors):
    return ~((task_vectors > 0).any(0) & (task_vectors < 0).any(0))


def plain_mean(task_vectors, sign):
    return task_vectors.mean(0)


def signed_size(task_vectors, sign):
    return sign * task_vectors.abs().sum(0) / (task_vectors != 0).sum(0).clamp(min=1)


def sizes_only(task_vectors, sign):
    return disjoint_mean(task_vectors, sign).abs()


def over_all(task_vectors, sign):
    agrees = task_vectors.sign() == sign
    return (task_vectors * agrees).sum(0) / agrees.sum().clamp(min=1)


exercise(
    "07.5", "disjoint mean", disjoint_mean, elected_cases,
    wrong=[
        Wrong(plain_mean, "this is the plain mean: leave out the entries whose sign is not the elected one"),
        Wrong(sizes_only, "the mean keeps its sign: average the values themselves, not their magnitudes"),
        Wrong(over_all, "count the models that agree entry by entry: agrees.sum(0), not agrees.sum()"),
        Wrong(among(by="models"), "divide by the number of models that AGREE, not by all models"),
        Wrong(among(by="present"), "divide by the models that agree: one that disagrees is not counted either"),
        Wrong(among(by="one"), "a mean, not a sum: divide by the number of models that agree"),
        Wrong(among(by="bare"), "where nobody agrees this is 0 / 0: clamp the count to at least 1"),
        Wrong(among(only=no_conflict), "conflicting entries are filled too, from the side that won"),
        Wrong(among(agree=lambda x, sign: (x >= 0) == (sign > 0)), "a trimmed entry (0) agrees with nobody: do not count it"),
        Wrong(signed_size, "entries of the other sign do not take part, not even with their sign turned"),
    ],
)  # fmt: skip


# 07.6 dare


def drop_cases(draw):
    for p, shape in zip((0.5, 0.9, 0.8), draw.sizes(3, 60, 90), strict=True):
        x = draw.normal(*shape)
        yield case(torch.where(x.abs() < 0.01, 0.01, x), p, draw.randint(0, 999))
    yield case(draw.normal(7, 9) + 5, 0.0, 1)


def use_dare(fn, task_vector, p, seed):
    """What DARE promises, whatever draws the dice: factors of what is left, the share dropped, and the seed's say."""
    one, again, other = (fn(task_vector, p, torch.Generator().manual_seed(s)) for s in (seed, seed, seed + 1))
    factors = (one / task_vector).flatten()
    left = factors[factors != 0]
    dropped = 1 - len(left) / len(factors)
    return {
        "factors of what is left": sorted({round(value, 2) for value in left.tolist()}),
        "share dropped": f"{p:.2f}, as asked" if abs(dropped - p) < 0.05 else f"{dropped:.1f}",
        "left in most rows": bool(p == 0 or (one != 0).any(1).float().mean() > 0.8),
        "left in most columns": bool(p == 0 or (one != 0).any(0).float().mean() > 0.8),
        "largest entry may go": bool(p == 0 or _loses_the_largest(fn, task_vector, p)),
        "same seed, same entries": bool(torch.equal(one, again)),
        "another seed, other entries": bool(p == 0 or not torch.equal(one, other)),
    }


def _loses_the_largest(fn, task_vector, p):
    place = task_vector.abs().argmax()
    return any(fn(task_vector, p, torch.Generator().manual_seed(s)).flatten()[place] == 0 for s in range(12))


def dropped(drop=lambda p: p, scale=lambda p: 1 / (1 - p), seeded=True, noise=torch.rand, shape=lambda shape: shape):
    """`dare` with one mistake."""

    def dare(task_vector, p, generator=None):
        drawn = noise(shape(task_vector.shape), generator=generator if seeded else None)
        return task_vector * (drawn >= drop(p)) * scale(p)

    return dare


def by_size(task_vector, p, generator=None):
    return trim(task_vector, 1 - p) / (1 - p)


exercise(
    "07.6", "drop and rescale", dare, drop_cases, call=use_dare,
    wrong=[
        Wrong(dropped(scale=lambda p: 1.0), "what is left must be scaled up by 1 / (1 - p), or the sum shrinks"),
        Wrong(dropped(drop=lambda p: 1 - p), "p is the share that is DROPPED, not the share that is kept"),
        Wrong(dropped(drop=lambda p: 1 - p, scale=lambda p: 1 / p if p else 1.0), "here p is the share kept, and 1/p its "
              "factor: in DARE p is dropped, and the factor is 1 / (1 - p)"),
        Wrong(dropped(scale=lambda p: 1 / p if p else 1.0), "the factor is 1 / (1 - p), not 1 / p"),
        Wrong(dropped(scale=lambda p: (1 - p) ** -0.5), "1 / (1 - p) keeps the mean; its root would keep the norm"),
        Wrong(dropped(seeded=False), "the choice must come from the generator: torch.rand(..., generator=generator)"),
        Wrong(dropped(scale=lambda p: 1 - p), "divide what is left by 1 - p, do not multiply"),
        Wrong(dropped(drop=lambda p: p / 100), "p is a fraction: 0.9 drops 90 %"),
        Wrong(dropped(noise=torch.randn), "torch.rand is uniform on 0 to 1, so that a share p lies below p; randn is not"),
        Wrong(dropped(shape=lambda shape: shape[-1:]), "each ENTRY has dice of its own: this drops whole columns"),
        Wrong(dropped(shape=lambda shape: (shape[0], 1)), "each ENTRY has dice of its own: this drops whole rows"),
        Wrong(by_size, "entries are dropped at random, not by size: trimming is the step of TIES"),
    ],
)  # fmt: skip


# 07.7 concatenate


def adapter_cases(draw):
    for models, (fan_in, fan_out) in zip((2, 3, 2), draw.sizes(3, 9, 15), strict=True):
        ranks = [3] * models
        adapters = [
            Adapter(draw.normal(r, fan_in), draw.normal(fan_out, r), draw.choice([0.5, 2.0, 4.0])) for r in ranks
        ]
        yield case(adapters, [draw.choice([0.3, 0.6, -0.5]) for _ in range(models)])
    yield case([Adapter(draw.normal(r, 8), draw.normal(6, r), 2.0) for r in (1, 2)], None)


def use_adapter(fn, adapters, weights):
    """The update that the new adapter makes, and its rank."""
    made = Adapter(*fn(adapters, weights))
    if made.A.ndim != 2 or made.A.shape[1] != adapters[0].A.shape[1] or made.B.shape[0] != adapters[0].B.shape[0]:
        return {"shapes of A and B": [list(made.A.shape), list(made.B.shape)]}
    return {"update": update(made), "rank": len(made.A)}


def side_by_side(scaled=True, weighted=True, twice=False, keep_scaling=False):
    """`concatenate` with one mistake."""

    def concatenate(adapters, weights=None):
        w = [1.0] * len(adapters) if weights is None or not weighted else weights
        factors = [x * (a.scaling if scaled else 1.0) for x, a in zip(w, adapters, strict=True)]
        A = torch.cat([f * a.A for f, a in zip(factors, adapters, strict=True)])
        right = factors if twice else [1.0] * len(adapters)
        B = torch.cat([f * a.B for f, a in zip(right, adapters, strict=True)], dim=1)
        return Adapter(A, B, adapters[0].scaling if keep_scaling else 1.0)

    return concatenate


def factors_added(adapters, weights=None):
    w = [1.0] * len(adapters) if weights is None else weights
    rank = max(len(a.A) for a in adapters)
    A, B = torch.zeros(rank, adapters[0].A.shape[1]), torch.zeros(adapters[0].B.shape[0], rank)
    for x, a in zip(w, adapters, strict=True):
        A[: len(a.A)] += x * a.scaling * a.A
        B[:, : len(a.A)] += a.B
    return Adapter(A, B)


def wrong_sides(adapters, weights=None):
    A = torch.cat([a.A for a in adapters], dim=1)
    return Adapter(A, torch.cat([a.B for a in adapters]))


def stacked_twice(adapters, weights=None):
    right = concatenate(adapters, weights)
    return Adapter(right.A, torch.cat([a.B for a in adapters]))


def shared_out(adapters, weights=None):
    w = [1.0] * len(adapters) if weights is None else weights
    return concatenate(adapters, [x / sum(w) for x in w])


exercise(
    "07.7", "concatenate adapters", concatenate, adapter_cases, call=use_adapter, rtol=1e-4, atol=1e-5,
    wrong=[
        Wrong(factors_added, "this adds A to A and B to B: their product has terms B_1 A_2 that nobody trained; stack the "
              "As and put the Bs side by side"),
        Wrong(wrong_sides, "stack the As along the rank (dim 0) and put the Bs side by side (dim 1)"),
        Wrong(stacked_twice, "A is right; the Bs stand side by side: torch.cat along dim 1"),
        Wrong(shared_out, "do not divide by the sum of the weights: this is a sum, not an average"),
        Wrong(side_by_side(scaled=False), "each adapter's scaling (alpha / r) belongs to its update"),
        Wrong(side_by_side(weighted=False), "each adapter has its weight: put it into one of the factors"),
        Wrong(side_by_side(twice=True), "weight and scaling belong into ONE factor: in both they are squared"),
        Wrong(side_by_side(keep_scaling=True), "the scalings are inside the factors now: the new adapter's is 1"),
    ],
)  # fmt: skip
