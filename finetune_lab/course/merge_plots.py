"""What lesson 07 draws and tells of merges: recorded figures, the plane through three models, conflicts by layer.

Recorded figures come from bench `merge_effects` (five seeds); the rest is computed from the models that it is given.
Every picture comes with its alternative text. Leaves out: the merging itself (`methods.merging`, `merge_ways`).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from finetune_lab.course import bench, plots
from finetune_lab.course.merge_paired import SKILLS, title
from finetune_lab.methods import merging

Weights = Mapping[str, Tensor]


@functools.cache
def _rows() -> dict[str, float]:
    return {row["name"]: row["value"] for row in bench.recorded("merge_effects")["rows"]}


def found(name: str, measure: str) -> tuple[float, float]:
    """(mean, standard deviation) over five seeds of one recorded measure. Raises KeyError for a row that is not there."""
    return _rows()[f"{name}: {measure}"], _rows()[f"{name}: {measure}, standard deviation"]


def table(*names: str, measures: Sequence[str] = SKILLS, width: int = 32) -> None:
    """Print recorded shares in percent, mean ± standard deviation, a line a name."""
    for name in names:
        cells = ((measure, *found(name, measure)) for measure in measures)
        print(f"{name:{width}} " + "  ".join(f"{m} {100 * mean:3.0f} ± {100 * sd:2.0f}" for m, mean, sd in cells))


def difference(one: str, other: str, measure: str) -> tuple[float, float]:
    """(mean, half of the 95 % interval) of a recorded paired difference. Raises KeyError for a pair that is not there."""
    name = title(one, other, measure)
    return _rows()[name], _rows()[f"{name}, half of the 95 % interval"]


def gaps(*pairs: tuple[str, str], measure: str = "kept", unit: float = 100, width: int = 60) -> None:
    """Print recorded paired differences, a line a pair: mean ± half of the 95 % interval, and whether they are apart."""
    for one, other in pairs:
        gap, half = difference(one, other, measure)
        verdict = "apart" if abs(gap) > half else "undecided"
        digits = 1 if unit == 100 else 2
        told = f"{one} minus {other.removeprefix(one.split(', ')[0] + ', ')}"
        print(f"{told:{width}} {measure} {unit * gap:+.{digits}f} ± {unit * half:.{digits}f}  {verdict}")


def sweep(
    title: str, x: str, xs: Sequence[str], series: Mapping[str, tuple[Sequence[str], str]], y: str = "right (%)"
) -> tuple[Figure, str]:
    """(figure, alt): recorded shares against a setting, one standard deviation each way (cut at 0).

    xs: the setting's values; series: label -> (the row name at each value, measure).
    """
    figure, ax = plots.axes(title, x, y, size=(5.2, 2.3))
    said = []
    for (label, (names, measure)), colour, marker in zip(series.items(), plots.COLOURS, plots.MARKERS, strict=False):
        means, sds = zip(*(found(name, measure) for name in names), strict=True)
        height, spread = [100 * v for v in means], [100 * v for v in sds]
        below = [min(pair) for pair in zip(height, spread, strict=True)]
        ax.errorbar(range(len(xs)), height, yerr=[below, spread], color=colour, marker=marker, capsize=3, label=label)
        said.append(f"{label} " + ", ".join(f"{v:.0f} ± {s:.0f}" for v, s in zip(height, spread, strict=True)))
    ax.set_xticks(range(len(xs)), xs)
    ax.set_ylim(-5, 112)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure, f"{title}. Percent at {x} {', '.join(xs)}: " + "; ".join(said) + "."


def lines(start: str, ends: Sequence[str], title: str) -> tuple[Figure, str]:
    """(figure, alt): the recorded loss on the skill `start` along straight lines from its specialist to `ends`."""
    figure, ax = plots.axes(
        title, f"share t of the way from the {start} specialist", f"loss on {start} (nats)", (5.6, 2.9)
    )
    ts, said = [i / 10 for i in range(11)], []
    for end, colour, marker in zip(ends, plots.COLOURS, plots.MARKERS, strict=False):
        means, sds = zip(*(found(f"{start} to {end}, t={t:g}", "loss") for t in ts), strict=True)
        ax.errorbar(ts, means, yerr=sds, color=colour, marker=marker, markersize=4, label=f"to {end}")
        said.append(f"to {end}: {means[0]:.2f} at the start, {means[5]:.2f} half way, {means[10]:.2f} at the end")
    ax.set_yscale("log")
    ax.legend(fontsize=8)
    return figure, f"Loss on {start}, logarithmic axis, means of five seeds. " + "; ".join(said) + "."


def barrier(start: str, end: str) -> str:
    """How far the recorded loss on `start` rises above the straight line between its values at both ends."""
    losses = [found(f"{start} to {end}, t={i / 10:g}", "loss")[0] for i in range(11)]
    above = [v - losses[0] - i / 10 * (losses[10] - losses[0]) for i, v in enumerate(losses)]
    return f"to {end}: barrier {max(above):.2f} nats, half way {above[5]:+.2f} from the straight line"


class Plane:
    """The plane through three models: x runs from the first to the second, y at a right angle toward the third."""

    def __init__(self, a: Weights, b: Weights, c: Weights) -> None:
        self.names = list(a)
        self.origin, b, c = self._flat(a), self._flat(b), self._flat(c)
        self.width = _norm(b - self.origin)
        self.x = (b - self.origin) / self.width
        up = (c - self.origin) - self.x * (self.x * (c - self.origin)).sum()
        self.height = _norm(up)
        self.y = up / self.height

    def _flat(self, weights: Weights) -> Tensor:
        return torch.cat([weights[name].detach().float().flatten() for name in self.names])

    def point(self, x: float, y: float, like: Weights) -> dict[str, Tensor]:
        """The model at (x, y), tensors shaped as those of `like`."""
        parts = (self.origin + x * self.x + y * self.y).split([like[name].numel() for name in self.names])
        return {name: part.view_as(like[name]) for name, part in zip(self.names, parts, strict=True)}

    def place(self, weights: Weights) -> tuple[float, float]:
        """(x, y) of a model, or of the point of the plane that is nearest to it."""
        away = self._flat(weights) - self.origin
        return (self.x * away).sum().item(), (self.y * away).sum().item()


def _norm(x: Tensor) -> float:
    """Length of a long vector: `x.norm()` is 2 % off for 134 million entries, `sum` adds in pairs."""
    return x.square().sum().sqrt().item()


def slice_of_loss(
    marks: Mapping[str, Weights], loss: Callable[[Weights], float], steps: int = 9, title: str = ""
) -> tuple[Figure, str]:
    """(figure, alt): contours of `loss` on the plane through the first three models of `marks`; all are marked."""
    three = list(marks.values())[:3]
    plane = Plane(*three)
    xs, ys = (torch.linspace(-0.2, 1.2, steps) * size for size in (plane.width, plane.height))
    ground = torch.tensor([[loss(plane.point(x, y, three[0])) for x in xs.tolist()] for y in ys.tolist()])
    figure, ax = plots.axes(title, "", "", size=(4.0, 2.6))
    low, high = ground.min().item(), ground.max().item()
    levels = [low + share * (high - low) for share in (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)]
    ax.clabel(ax.contour(xs, ys, ground, levels=levels, colors=plots.BLACK, linewidths=0.6), fontsize=7, fmt="%.1f")
    for (name, weights), marker, colour in zip(marks.items(), plots.MARKERS, plots.COLOURS, strict=False):
        spot = plane.place(weights)
        ax.plot(*spot, marker=marker, color=colour, markersize=8)
        ax.annotate(name, spot, xytext=(0, 8), textcoords="offset points", color=colour, weight="bold", ha="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})  # fmt: skip
    first, second, third = list(marks)[:3]
    ax.set(xticks=[], yticks=[], xlabel=f"from {first} to {second}", ylabel=f"toward {third}")
    own = ", ".join(f"{name} {loss(weights):.2f}" for name, weights in marks.items())
    return (
        figure,
        f"Contours of the mean loss on the plane: {own}; lowest of the grid {low:.2f}, highest {high:.2f}.",
    )


def conflicts(taus: Mapping[str, Weights], pairs: Sequence[tuple[str, str]], most: int = 6) -> str:
    """Percent of the entries with opposite signs, a line a layer: of all, and of those in both models' largest 20 %."""
    names = [name for name in next(iter(taus.values())) if ".layers." in name]
    layers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names})
    lines = []
    for layer in layers[:: math.ceil(len(layers) / most)]:
        inside = [n for n in names if f".layers.{layer}." in n and taus[pairs[0][0]][n].ndim == 2]
        cells = []
        for pair in pairs:
            of_all = merging.sign_conflicts([torch.cat([taus[s][n].flatten() for n in inside]) for s in pair])
            x, y = (torch.cat([merging.trim(taus[s][n], 0.2).flatten() for n in inside]) for s in pair)
            both = x * y != 0
            of_large = (x * y < 0).sum() / both.sum().clamp(min=1)
            cells.append(f"{' and '.join(pair)} {100 * of_all:.0f} (large in both: {100 * of_large:.0f})")
        lines.append(f"layer {layer:2}, % in conflict: " + ", ".join(cells))
    return "\n".join(lines)
