"""Code books: the few levels in [-1, 1] that a quantised weight may take, once its block is divided by its absmax.

Papers: NF4 is QLoRA (Dettmers et al. 2023, arXiv 2305.14314, eq. 4 and appendix E); the dynamic 8-bit code is Dettmers
2015 (arXiv 1511.04561), used for optimizer states in 2110.02861. Formula: NF4 = {Phi^-1(p)} / max over 7 p below and 8
above one half, and 0. Leaves out: codes that depend on the block size (AF4, arXiv 2306.06965) and learnt ones.
In production: `bitsandbytes.functional.get_4bit_type`, `create_normal_map`, `create_dynamic_map`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.special import ndtri

# Largest probability of NF4. A bin of 1/32 on one side and of 1/30 on the other would end at 1 - 1/32 and 1 - 1/30:
# the offset is the middle of the two, 1 - (1/32 + 1/30) / 2 = 0.96770833..., cut to seven digits in bitsandbytes.
NF4_OFFSET = 0.9677083


def nf4_code() -> Tensor:
    """The 16 levels of NF4 (16,), ascending, fp32: -1, six more below zero, an exact 0, eight above up to 1.

    Probabilities run evenly from NF4_OFFSET to 1/2: in 8 steps above zero and in 7 below. Both halves end at 1/2, whose
    quantile is 0: kept once. Phi^-1(1) would be infinite, so the outermost probability stops short, at the offset.
    Equal to the last bit to the table in bitsandbytes (`get_4bit_type("nf4")`).
    """
    above = ndtri(torch.linspace(NF4_OFFSET, 0.5, 9)[:-1].double())
    below = -ndtri(torch.linspace(NF4_OFFSET, 0.5, 8)[:-1].double())
    levels = torch.cat([below, torch.zeros(1), above]).float().sort().values
    return levels / levels.max()


def symmetric_quantile_code(bits: int = 4) -> Tensor:
    """What many notes call NF4: Phi^-1((2i+1) / 2^(bits+1)), scaled to [-1, 1]. Symmetric, and it has no zero."""
    i = torch.arange(2**bits, dtype=torch.double)
    levels = ndtri((2 * i + 1) / 2 ** (bits + 1))
    return (levels / levels.max()).float()


def fp4_code() -> Tensor:
    """FP4 (16,) in the order of its bits, as bitsandbytes stores it: a sign, two exponent bits, one of fraction.

    Not ascending, and 0 stands in it twice (0 and -0). Levels before scaling: 0, 1/16, 2, 3, 4, 6, 8, 12.
    """
    positive = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3])
    return torch.cat([positive, -positive]) / 12


def int_code(bits: int) -> Tensor:
    """Symmetric integers -m..m over m, m = 2^(bits-1) - 1: the levels of "absmax" INT4 (15) and INT8 (255)."""
    m = 2 ** (bits - 1) - 1
    return torch.arange(-m, m + 1) / m


def int_rounding_rms(absmax: float, bits: int) -> float:
    """Root mean square error of rounding to `int_code(bits)` times absmax: step / sqrt(12), for values spread evenly."""
    return absmax / (2 ** (bits - 1) - 1) / math.sqrt(12)


def dynamic_code(signed: bool = True) -> Tensor:
    """The dynamic 8-bit code (256,), ascending: 7 decades down to 1e-7, twice as many levels in each as in the one below.

    signed: for first moments and block scales; unsigned for second moments, one more bit for the fraction. Every level
    is the middle of its interval; 0 and 1 are added. So the largest negative level is -0.993 and not -1.
    Source: `bitsandbytes.functional.create_dynamic_map`, equal to the last bit.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (2**decade if signed else 2 ** (decade + 1)) + 1)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [middles, -middles] if signed else [middles]
    return torch.cat(levels).sort().values


def midpoints(code: Tensor) -> tuple[Tensor, Tensor]:
    """The boundaries between neighbouring levels (levels - 1,), ascending, and which entry of `code` is the i-th level."""
    order = code.argsort()
    levels = code[order]
    return (levels[:-1] + levels[1:]) / 2, order


def nearest(x: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest level for every value of `x`; a value on a midpoint goes to the lower one. uint8, shape of x.

    A binary search among the midpoints: no (values, levels) table of distances is made.
    """
    boundaries, order = midpoints(code)
    return order[torch.bucketize(x.float(), boundaries)].to(torch.uint8)


def blocks(w: Tensor, blocksize: int) -> Tensor:
    """`w` in fp32, read row by row into blocks (blocks, blocksize); the last one is filled up with zeros."""
    flat = w.detach().flatten().float()
    return F.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)


def round_trip(w: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """`w` quantised to `code` in blocks with one absmax each and restored, fp32: for measuring errors of any code."""
    x = blocks(w, blocksize)
    absmax = x.abs().amax(1, keepdim=True)
    restored = code[nearest(x / absmax.clamp(min=1e-38), code).long()] * absmax
    return restored.flatten()[: w.numel()].view(w.shape)


def affine_round_trip(w: Tensor, bits: int, blocksize: int) -> Tensor:
    """The same with a zero point: each block's own range [min, max], 0 included, in 2^bits equal steps. fp32.

    scale = (max - min) / (2^bits - 1); q = round(w / scale) + zero_point: all levels are used where a block is lopsided.
    """
    x = blocks(w, blocksize)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-38)
    zero_point = (-low / scale).round()
    q = ((x / scale).round() + zero_point).clamp(0, 2**bits - 1)
    return ((q - zero_point) * scale).flatten()[: w.numel()].view(w.shape)


def lloyd_max(samples: Tensor, code: Tensor, steps: int = 200) -> Tensor:
    """A code of smaller mean square error on `samples` (n,) in [-1, 1]: Lloyd's iteration from `code`, ends held fixed.

    Each step moves every inner level to the mean of the samples that choose it. For comparing, not for use: blocks are
    weighted equally here, and a trained code has no exact zero.
    """
    levels = code.sort().values.double()
    samples = samples.double()
    for _ in range(steps):
        chosen = nearest(samples, levels.float()).long()
        count = torch.bincount(chosen, minlength=len(levels))
        total = torch.zeros_like(levels).index_add_(0, chosen, samples)
        means = torch.where(count > 0, total / count.clamp(min=1), levels)
        levels[1:-1] = means[1:-1]
    return levels.float()
