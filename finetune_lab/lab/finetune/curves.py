"""The picture of a run: training loss of each step and held-out loss; beside it the rewards, where there are some."""

import math

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def curve(report: dict) -> Figure:
    """report: as `report.build` makes it, with `loss`, `held_out_loss`, `rewards`, `final_loss` and `recipe`."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.right": False, "axes.spines.top": False}):
        two = bool(report["rewards"])
        figure = Figure(figsize=(9.6 if two else 6.4, 3.2), layout="constrained")
        panels = figure.subplots(1, 1 + two, squeeze=False)[0]
        _losses(panels[0], report)
        if two:
            _rewards(panels[1], report["rewards"])
        for axes in panels:
            axes.set(xlabel="optimizer step")
            axes.grid(alpha=0.25)
    return figure


def _losses(axes: Axes, report: dict) -> None:
    steps, values = zip(*report["loss"], strict=True)
    axes.plot(steps, values, color=BLUE, linewidth=1.2)
    side = "bottom"
    if report["held_out_loss"]:
        at, held = zip(*report["held_out_loss"], strict=True)
        side = "bottom" if values[-1] >= held[-1] else "top"  # each label on its own side
        axes.plot(at, held, color=VERMILLION, marker="s", markersize=5, linewidth=1.5)
        other = "top" if side == "bottom" else "bottom"
        axes.annotate(" held out", (at[-1], held[-1]), color=VERMILLION, va=other, annotation_clip=False)
    axes.annotate(" training", (steps[-1], values[-1]), color=BLUE, va=side, annotation_clip=False)
    axes.set_title(f"Loss from {values[0]:.3g} to {report['final_loss']:.3g} in {steps[-1]} steps", loc="left")
    unit = "nats a token" if report["trainer"] == "sft" else report["recipe"]["loss"]
    axes.set(ylabel=f"loss ({unit})")
    if report["recipe"]["loss"] in ("sigmoid", "sigmoid_norm"):
        axes.axhline(math.log(2), color="black", linewidth=0.8, linestyle=":")
        axes.annotate("log 2: no preference", (steps[-1], math.log(2)), ha="right", va="top", fontsize=8)
    shown = [value for row in (report["loss"], report["held_out_loss"]) for _, value in row]
    if min(shown) > 0 and max(shown) > 30 * min(shown):
        axes.set(yscale="log", ylabel=f"loss ({unit}), log scale")
    elif min(shown) >= 0:
        axes.set_ylim(0, None)


def _rewards(axes: Axes, rewards: list[list[float]]) -> None:
    steps, chosen, rejected = zip(*rewards, strict=True)
    for values, name, colour, style in ((chosen, "chosen", GREEN, "-"), (rejected, "rejected", PURPLE, "--")):
        axes.plot(steps, values, color=colour, linestyle=style, linewidth=1.4)
        axes.annotate(f" {name}", (steps[-1], values[-1]), color=colour, va="center", annotation_clip=False)
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set(ylabel="reward: beta (log pi - log ref)")
    axes.set_title("Rewards of the training batches", loc="left")
