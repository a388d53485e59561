"""The picture of a code book: where weights lie after scaling, and where two codes of the same bits put their levels.

    figure, text = codebook_plot(bits=4, block=64, distribution="normal")      # pure: what an Explorer draws

The histogram shows weights divided by the largest of their block. Under it stand the levels of NormalFloat (quantiles,
triangles) and of evenly spaced integers (bars); the text gives both errors and how full the levels are.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.special import ndtri

from finetune_lab.course import plots
from finetune_lab.errors import UserError
from finetune_lab.methods.codebooks import blocks, int_code, nearest, round_trip

COUNT = 2**16
DISTRIBUTIONS = ("normal", "uniform", "heavy tails", "normal, one outlier in 4096")


def normal_float_code(bits: int) -> Tensor:
    """NormalFloat with 2^bits levels, made as NF4 is: 2^(bits-1) steps above zero, one less below, and an exact zero."""
    half = 2 ** (bits - 1)
    offset = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above = ndtri(torch.linspace(offset, 0.5, half + 1, dtype=torch.double)[:-1])
    below = -ndtri(torch.linspace(offset, 0.5, half, dtype=torch.double)[:-1])
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    return (levels / levels.max()).float()


def samples(distribution: str, count: int = COUNT) -> Tensor:
    """`count` seeded values with standard deviation near 1. heavy tails: Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator)
    if distribution == "normal":
        return normal
    if distribution == "uniform":
        return (torch.rand(count, generator=generator) - 0.5) * 12**0.5
    if distribution == "heavy tails":
        chi = torch.randn(3, count, generator=generator).square().sum(0)
        return normal / chi.sqrt()  # t = z / sqrt(chi2 / 3) has a standard deviation of sqrt(3)
    if distribution == "normal, one outlier in 4096":
        normal[::4096] = 30.0
        return normal
    raise UserError(f"unknown distribution {distribution!r}: choose one of {', '.join(DISTRIBUTIONS)}")


def codebook_plot(bits: int, block: int, distribution: str) -> tuple[Figure, str]:
    """(figure, one line of text). bits: 2 to 8; block: weights that share a scale; distribution: see DISTRIBUTIONS."""
    w = samples(distribution)
    x = blocks(w, block)
    scaled = (x / x.abs().amax(1, keepdim=True)).flatten()
    codes = {f"NF{bits}": normal_float_code(bits), f"INT{bits}": int_code(bits)}
    restored = {name: round_trip(w, code, block) for name, code in codes.items()}
    errors = {name: 100 * ((back - w).square().mean().sqrt() / w.std()).item() for name, back in restored.items()}
    alike = len({f"{error:.1f}" for error in errors.values()}) == 1  # as the text prints them
    verdict = "Both err alike" if alike else f"{min(errors, key=errors.get)} errs less"
    title = f"{verdict}: {distribution}, blocks of {block}"
    figure, ax = plots.axes(title, "weight / largest of its block", "share")
    counts = torch.histc(scaled, 80, -1, 1) / len(scaled)
    ax.stairs(counts.numpy(), torch.linspace(-1, 1, 81).numpy(), fill=True, color="#d0d0d0")
    top = counts.max().item()
    for row, ((name, code), colour, marker) in enumerate(
        zip(codes.items(), plots.COLOURS, ("^", "|"), strict=False), start=1
    ):
        ax.plot(code.tolist(), [-0.09 * row * top] * len(code), marker, color=colour, markersize=7, clip_on=False)
        ax.annotate(name, (1, -0.09 * row * top), xytext=(9, 0), textcoords="offset points", va="center", color=colour)
    ax.set(xlim=(-1.03, 1.03), ylim=(-0.24 * top, 1.05 * top))
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= 1.05 * top])
    full = torch.bincount(nearest(scaled, codes[f"NF{bits}"]).long(), minlength=2**bits) / len(scaled)
    text = (
        f"error (rms, % of the spread): {', '.join(f'{name} {e:.1f}' for name, e in errors.items())}; fullest NF level "
        f"{100 * full.max():.1f} %, emptiest {100 * full.min():.1f} % (even: {100 / 2**bits:.1f} %); "
        f"{bits + 32 / block:.3g} bits a weight with its scale"
    )
    return figure, text
