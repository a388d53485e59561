"""The explorer of lesson 06: what a leash buys, replies that keep the rule against nats of KL.

    figure, text = frontier(points, start=0.5, setting="beta 1")      # pure: for Explorer

A policy that only moves probability from bad replies to good ones, and else keeps the reference's proportions, pays the
least KL for its share of good replies: w log(w/g) + (1-w) log((1-w)/(1-g)), from the share g of the reference. No policy
lies left of that curve (data processing inequality); what a method lies to the right of it, it has spent on other things.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from finetune_lab.course import plots
from finetune_lab.errors import UserError
from finetune_lab.methods.scalars import least_kl


@dataclass(frozen=True)
class Point:
    """A trained policy: KL (nats a reply) and share of good replies, each (mean, standard deviation), and a note."""

    kl: tuple[float, float]
    good: tuple[float, float]
    note: str = ""


def frontier(points: Mapping[str, Point], start: float, setting: str) -> tuple[Figure, str]:
    """(figure, sentence): all points, the bound from `start` on, and the point `setting` in words.

    Raises UserError for a setting that is not among the points.
    """
    if setting not in points:
        raise UserError(f"no setting {setting!r}: choose one of {', '.join(points)}")
    chosen = points[setting]
    least = least_kl(chosen.good[0], start)
    if chosen.good[0] < start:
        title = f"{setting}: worse than the start"
    else:
        title = f"{setting}: {100 * chosen.good[0]:.0f} % good for {chosen.kl[0]:.2g} nats"
    figure, ax = plots.axes(
        title, "KL to the reference (nats a reply, square-root axis)", "replies that keep the rule (%)", size=(5.8, 3.2)
    )
    shares = [start + (0.999 - start) * i / 60 for i in range(61)]
    ax.plot([least_kl(w, start) for w in shares], [100 * w for w in shares], color=plots.BLACK, linestyle="--")
    ax.annotate(
        "no policy above, from the mean start",
        (least_kl(0.93, start), 100),
        xytext=(38, 8),
        textcoords="offset points",
        ha="center",
    )
    ax.plot(0, 100 * start, color=plots.BLACK, marker="D", clip_on=False)
    ax.annotate("start", (0, 100 * start), xytext=(9, -4), textcoords="offset points")
    by_kl = sorted(points.items(), key=lambda item: item[1].kl)  # labels stand left, below and right of them in turn
    for n, (name, point) in enumerate(by_kl):
        here = name == setting
        colour, marker = (plots.VERMILLION, "s") if here else (plots.BLUE, "o")
        ax.errorbar(
            point.kl[0], 100 * point.good[0], xerr=point.kl[1], yerr=100 * point.good[1],
            color=colour, marker=marker, markersize=8 if here else 5, capsize=2, linestyle="", linewidth=1.2,
        )  # fmt: skip
        low = point.good[0] < start
        end = (point.kl[0], 100 * (point.good[0] + (point.good[1] if low else -point.good[1])))
        away = (0, 26) if low else [(-34, -34), (0, -58), (34, -34)][n % 3]  # leader lines: the points stand close
        ax.annotate(
            name, end, xytext=away, textcoords="offset points", color=colour, ha="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7},
        )  # fmt: skip
    ax.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
    ax.set_xlim(0, 1.7 * max(point.kl[0] for point in points.values()))
    ax.set_xticks([0, 0.25, 1, 2, 4, 8], ["0", "0.25", "1", "2", "4", "8"])
    ax.set_ylim(-20, 112)
    ax.set_yticks(range(0, 101, 20))
    return figure, (
        f"{setting}: {100 * chosen.good[0]:.0f} ± {100 * chosen.good[1]:.0f} % good replies (start {100 * start:.0f} %), "
        f"KL {chosen.kl[0]:.2f} ± {chosen.kl[1]:.2f} nats; this share needs at least {least:.2f}. {chosen.note}"
    ).strip()
