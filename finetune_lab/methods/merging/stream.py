"""The merging methods for tensors of any size: a few reads in order, chunk by chunk, fp32 in buffers that stay.

What: `merge_tensor`, the numerical half of `finetune-lab merge`, with mergekit's parameter names and meanings; tested
against mergekit and against the plain forms beside this file.
Formula of all but `linear` and `slerp`: theta = base + lambda * consensus_i(w_i * sparsify_i(theta_i - base)), where
sparsify is nothing (task arithmetic), TIES's trimming or DARE, and consensus a sum or TIES's election.
Why it is fast: one chunk of every model stays in the processor's cache from the first operation to the last; trimming
finds its threshold by counting (`select`) instead of sorting; comparisons write 0.0 and 1.0 into fp32 buffers, which
vectorises where boolean masks do not; DARE draws 8 random bits for an entry.
Leaves out: reading and writing files (`lab.merging`), fp64 (computed in fp32), `rescale` for TIES.
In production: mergekit, which merges whole tensors in the dtype of the model.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

from finetune_lab.methods.merging.dare import BLOCK, random_keep
from finetune_lab.methods.merging.linear import arc
from finetune_lab.methods.merging.select import Cut

CHUNK = 2**18  # entries, whole BLOCKs: 1 MiB in fp32, so that a handful of buffers stays in the last-level cache
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
Sparsify = Callable[[Tensor, Tensor], Tensor]  # (chunk of a task vector, a buffer) -> the chunk, changed in place


@torch.no_grad()
def merge_tensor(
    method: str,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    parameters: dict,
    out: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Merge one weight of several models: mergekit's `merge_method` on one tensor.

    method: one of METHODS. base: the base model's tensor (None for linear; for slerp the end at t = 0).
    tensors: the other models' tensors (for slerp one), all of one shape, any floating dtypes, mapped files too.
    parameters: "weight" and "density" (one number per tensor), "t", "normalize", "lambda", "rescale" (DARE: divide by
        the density); what is missing has mergekit's default. density is the share kept, in [0, 1].
    out: where the result goes, rounded once to its dtype; None: a new tensor of the first dtype. Not an input.
    generator: seeds DARE. Extra memory: about (models + 5) MiB. Raises ValueError for wrong arguments.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(METHODS)}")
    inputs = [*tensors] if base is None else [base, *tensors]
    _check(method, base, tensors, inputs)
    out = torch.empty_like(inputs[0], memory_format=torch.contiguous_format) if out is None else out
    if out.shape != inputs[0].shape or not out.is_contiguous():
        raise ValueError(f"out has shape {tuple(out.shape)}: it must be contiguous, of shape {tuple(inputs[0].shape)}")
    models = [t.reshape(-1) for t in tensors]
    target = out.view(-1)
    if not len(target):
        return out
    if method == "slerp":
        if "t" not in parameters:
            raise ValueError("slerp needs a number t from 0 (the base) to 1 (the other model)")
        _slerp(base.reshape(-1), models[0], parameters["t"], target)
        return out
    weights = _per_model(parameters.get("weight", 1.0), models, "weight")
    if method == "linear":
        _linear(models, weights, parameters.get("normalize", True), target)
        return out
    flat = base.reshape(-1)
    sparsify, scales = _sparsifiers(method, flat, models, parameters, generator)
    normalize, lam = parameters.get("normalize", method == "ties"), parameters.get("lambda", 1.0)
    if method.endswith("ties"):
        _elect(flat, models, weights, scales, sparsify, normalize, lam, target)
    else:
        total = sum(weights) if normalize and abs(sum(weights)) >= 1e-8 else 1.0
        _add(flat, models, [lam / total * w * s for w, s in zip(weights, scales, strict=True)], sparsify, target)
    return out


def _linear(models: list[Tensor], weights: list[float], normalize: bool, out: Tensor) -> None:
    total = sum(weights) if normalize else 1.0
    if total == 0:
        raise ValueError(f"the weights {weights} add up to 0: they cannot be normalised, set normalize: false")
    if normalize and len(models) == 2 and models[0].dtype == models[1].dtype == out.dtype:
        torch.lerp(*models, weights[1] / total, out=out)  # one pass, fp32 inside, rounded once
        return
    x, y = _buffers(2, len(out))
    for i in range(0, len(out), CHUNK):
        merged = _read(models[0], i, x).mul_(weights[0] / total)
        for model, w in zip(models[1:], weights[1:], strict=True):
            merged.add_(_read(model, i, y), alpha=w / total)
        out[i : i + CHUNK].copy_(merged)


def _slerp(a: Tensor, b: Tensor, t: float, out: Tensor) -> None:
    x, y = _buffers(2, len(out))
    wide_x, wide_y = x.double(), y.double()  # towards opposite vectors 1/sin(W) magnifies the rounding of the cosine
    aa = bb = ab = 0.0
    for i in range(0, len(out), CHUNK):
        u, v = _read(a, i, wide_x), _read(b, i, wide_y)
        aa, bb, ab = aa + torch.dot(u, u).item(), bb + torch.dot(v, v).item(), ab + torch.dot(u, v).item()
    from_a, from_b = arc(ab, (aa * bb) ** 0.5, t)
    for i in range(0, len(out), CHUNK):
        out[i : i + CHUNK].copy_(_read(a, i, x).mul_(from_a).add_(_read(b, i, y), alpha=from_b))


def _add(base: Tensor, models: list[Tensor], factors: list[float], sparsify: list[Sparsify], out: Tensor) -> None:
    """base + the sum of the sparse task vectors, each times its factor."""
    theta, merged, tau, buffer = _buffers(4, len(out))
    for i in range(0, len(out), CHUNK):
        origin = _read(base, i, theta)
        total = merged[: len(origin)].copy_(origin)
        for model, factor, keep in zip(models, factors, sparsify, strict=True):
            total.add_(keep(_read(model, i, tau).sub_(origin), buffer), alpha=factor)
        out[i : i + CHUNK].copy_(total)


def _elect(
    base: Tensor,
    models: list[Tensor],
    weights: list[float],
    scales: list[float],
    sparsify: list[Sparsify],
    normalize: bool,
    lam: float,
    out: Tensor,
) -> None:
    """base + lam * what TIES elects among the sparse, weighted task vectors."""
    theta, mixed, divisor, sign, buffer, *taus = _buffers(5 + len(models), len(out))
    for i in range(0, len(out), CHUNK):
        origin = _read(base, i, theta)
        n = len(origin)
        mixed[:n].zero_()
        for tau, model, w, s, keep in zip(taus, models, weights, scales, sparsify, strict=True):
            mixed[:n].add_(keep(_read(model, i, tau).sub_(origin), buffer).mul_(w * s))
        torch.ge(mixed[:n], 0, out=sign[:n]).mul_(2).sub_(1)  # +1 where the sum is 0 or more, else -1
        _disjoint([tau[:n] for tau in taus], weights, sign[:n], mixed[:n], divisor[:n], buffer[:n])
        if normalize:
            mixed[:n].div_(divisor[:n].add_(torch.eq(divisor[:n], 0, out=buffer[:n])))
        out[i : i + CHUNK].copy_(origin.add_(mixed[:n], alpha=lam))


def _disjoint(
    taus: list[Tensor], weights: list[float], sign: Tensor, mixed: Tensor, divisor: Tensor, scratch: Tensor
) -> None:
    """mixed: the sum of the entries of the elected sign; divisor: the sum of their models' weights."""
    mixed.zero_(), divisor.zero_()
    for tau, w in zip(taus, weights, strict=True):
        agreeing = tau.mul_(sign).clamp_(min=0)  # what disagrees is negative now
        mixed.add_(agreeing)
        divisor.add_(torch.gt(agreeing, 0, out=scratch), alpha=w)
    mixed.mul_(sign)


def _sparsifiers(
    method: str, base: Tensor, models: list[Tensor], parameters: dict, generator: Generator | None
) -> tuple[list[Sparsify], list[float]]:
    """What thins out each task vector, and the factor that makes up for it (DARE's 1 / density)."""
    ones = [1.0] * len(models)
    if method == "task_arithmetic":
        return [_keep_all] * len(models), ones
    densities = _per_model(parameters.get("density", 1.0), models, "density")
    if not all(0 <= density <= 1 for density in densities):
        raise ValueError(f"density is {densities}, expected shares from 0 to 1 (20 % is 0.2)")
    if method == "ties":
        if parameters.get("rescale", False):
            raise ValueError("rescale: true is for dare_linear and dare_ties; TIES keeps its values, leave it out")
        return [_trim(base, model, density) for model, density in zip(models, densities, strict=True)], ones
    bits = torch.empty(CHUNK // 8, dtype=torch.int64)
    scales = [1 / density if density else 1.0 for density in densities]
    return [_drop(density, generator, bits) for density in densities], scales if parameters.get(
        "rescale", True
    ) else ones


def _keep_all(tau: Tensor, buffer: Tensor) -> Tensor:
    return tau


def _drop_all(tau: Tensor, buffer: Tensor) -> Tensor:
    return tau.zero_()


def _trim(base: Tensor, model: Tensor, density: float) -> Sparsify:
    """TIES's trimming: max(1, int(density * n)) entries stay, as in mergekit."""
    if density in (0, 1):
        return _keep_all if density else _drop_all
    theta, tau = _buffers(2, len(base))

    def chunks() -> Iterator[Tensor]:
        for i in range(0, len(base), CHUNK):
            yield _read(model, i, tau).sub_(_read(base, i, theta))

    cut = Cut(chunks, max(1, int(density * len(base))))
    return lambda tau, buffer: cut(tau, buffer[: len(tau)])


def _drop(density: float, generator: Generator | None, bits: Tensor) -> Sparsify:
    """DARE's dropping: every entry stays with probability `density`."""
    if density in (0, 1):
        return _keep_all if density else _drop_all

    def sparsify(tau: Tensor, buffer: Tensor) -> Tensor:
        return tau.mul_(random_keep(buffer[: _whole_blocks(len(tau))], density, generator, bits)[: len(tau)])

    return sparsify


def _whole_blocks(entries: int) -> int:
    return -(-entries // BLOCK) * BLOCK


def _buffers(count: int, entries: int) -> Tensor:
    return torch.empty(count, min(CHUNK, _whole_blocks(entries)))


def _read(tensor: Tensor, start: int, buffer: Tensor) -> Tensor:
    """The chunk of a flat tensor that begins at `start`, in the buffer and its dtype."""
    piece = tensor[start : start + CHUNK]
    return buffer[: len(piece)].copy_(piece)


def _per_model(values: float | Sequence[float], models: list[Tensor], name: str) -> list[float]:
    values = [values] * len(models) if isinstance(values, int | float) else list(values)
    if len(values) != len(models):
        raise ValueError(f"{len(values)} values of {name} for {len(models)} tensors: give one per tensor")
    return values


def _check(method: str, base: Tensor | None, tensors: Sequence[Tensor], inputs: list[Tensor]) -> None:
    if not tensors or (method == "slerp" and len(tensors) != 1):
        raise ValueError(
            f"{len(tensors)} tensors: {method} needs " + ("one and a base" if method == "slerp" else "one")
        )
    if base is None and method != "linear":
        raise ValueError(f"{method} needs the base model's tensor")
    if len({tuple(t.shape) for t in inputs}) > 1:
        raise ValueError(f"shapes {', '.join(str(tuple(t.shape)) for t in inputs)}: all tensors need the same shape")
    if not all(t.is_floating_point() for t in inputs):
        raise ValueError(f"dtypes {', '.join(str(t.dtype) for t in inputs)}: only floating-point weights are merged")
