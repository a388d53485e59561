"""Pictures in the house style: one message each, readable without colour, with alternative text.

    figure = plots.line(steps, {"train": a, "held out": b}, title="...", x="step", y="loss (nats)")
    plots.show(figure, alt="Loss falls from 5.1 to 0.2 nats in 40 steps and then stays.")

Colours have contrast of at least 3:1 on white; a marker and a direct label say the same as each colour, so nothing is
lost in grey. `show` publishes an HTML `<img alt>` of fixed width, and the same PNG with the alternative text in its
metadata: JupyterLab 4.6 and nbconvert 7.17 ignore that metadata but prefer HTML; other readers take the PNG.
"""

import base64
import html
import io
import os
import time
from typing import Self

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from finetune_lab.errors import UserError

BLACK, BLUE, VERMILLION, GREEN, PURPLE = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = [BLUE, VERMILLION, GREEN, PURPLE, BLACK]
MARKERS = ["o", "s", "^", "D", "v"]
HATCHES = ["", "//", "..", "xx", "\\\\"]
STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.figsize": (6.4, 3.2),
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
}
_DPI, _CSS_DPI = 144, 96


def axes(title: str, x: str, y: str, size: tuple[float, float] = (6.4, 3.2)):
    """(figure, axes) in the house style. `title` is the message; `x` and `y` name the quantity and its unit."""
    with matplotlib.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        ax.set(title=title, xlabel=x, ylabel=y)
    return figure, ax


def line(xs, ys, title: str, x: str, y: str) -> Figure:
    """Lines over `xs`: `ys` is one sequence, or {label: sequence} (at most five); labels stand at the line's end."""
    series = ys if isinstance(ys, dict) else {"": ys}
    if len(series) > len(COLOURS):
        raise UserError(f"{len(series)} lines in one picture; at most {len(COLOURS)} can be told apart.")
    figure, ax = axes(title, x, y)
    if all(float(value).is_integer() for value in xs):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # no step 2.5
    with matplotlib.rc_context(STYLE):
        for (label, values), colour, marker in zip(series.items(), COLOURS, MARKERS, strict=False):
            ax.plot(xs, values, color=colour, marker=marker, markevery=max(1, len(xs) // 8))
            if label:
                ax.annotate(
                    label,
                    (xs[-1], values[-1]),
                    xytext=(7, 0),
                    textcoords="offset points",
                    va="center",
                    color=colour,
                    annotation_clip=False,
                )
    return figure


def bars(values: dict[str, float], title: str, y: str, errors: dict[str, float] | None = None) -> Figure:
    """One labelled bar a name, its number above it, hatched so that it prints in grey. `errors`: one sd a name."""
    figure, ax = axes(title, "", y)
    for i, (name, value) in enumerate(values.items()):
        ax.bar(
            i,
            value,
            width=0.6,
            color="white",
            edgecolor=COLOURS[i % 5],
            hatch=HATCHES[i % 5],
            linewidth=1.5,
            yerr=(errors or {}).get(name),
            capsize=4,
        )
        top = max(value, 0) + (errors or {}).get(name, 0)
        ax.annotate(f"{value:.3g}", (i, top), xytext=(0, 3), textcoords="offset points", ha="center")
    ax.set_xticks(range(len(values)), list(values))
    ax.margins(y=0.15)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes with at most 128 colours (a third of the size), the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"axes.formatter.min_exponent": 5}):  # logarithmic axes: 0.006, not 6 x 10^-3
        figure.savefig(buffer, format="png", dpi=_DPI)
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def bundle(figure: Figure, alt: str) -> tuple[dict, dict]:
    """(data, metadata) of the picture for a notebook: PNG with its alternative text, HTML twin, plain text."""
    if not alt or not alt.strip():
        raise UserError("a picture needs alt: a sentence with the message and the numbers that carry it.")
    code = base64.b64encode(png(figure)).decode()
    width = round(figure.get_figwidth() * _CSS_DPI)
    tag = f'<img src="data:image/png;base64,{code}" alt="{html.escape(alt, quote=True)}" width="{width}">'
    data = {"image/png": code, "text/html": tag, "text/plain": alt}
    return data, {"image/png": {"alt": alt, "width": width}}


def show(figure: Figure, alt: str) -> None:
    """Display a figure with its alternative text, and close it (no second copy from the inline backend)."""
    from IPython.display import display

    data, metadata = bundle(figure, alt)
    plt.close(figure)
    display(data, metadata=metadata, raw=True)


def side_by_side(rows: list[tuple[str, str, str]], before: str = "before", after: str = "after") -> None:
    """Display a table of (prompt, answer before, answer after); every text is escaped, line breaks are kept."""
    from IPython.display import display

    style = 'style="text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"'
    head = "".join(f'<th scope="col" {style}>{html.escape(name)}</th>' for name in ("prompt", before, after))
    body = "".join(
        "<tr>" + "".join(f"<td {style}>{html.escape(str(text)) or '(nothing)'}</td>" for text in row) + "</tr>"
        for row in rows
    )
    plain = "\n\n".join(f"prompt: {p}\n{before}: {b}\n{after}: {a}" for p, b, a in rows)
    page = f'<table style="width:100%;table-layout:fixed"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    display({"text/html": page, "text/plain": plain}, raw=True)


class LiveCurve:
    """A curve that grows in place while a model trains: pass it as `on_step`.

        with plots.LiveCurve("Loss falls", y="loss (nats)", alt="The training loss.") as curve:
            train.sft(model, tokenizer, items, steps=60, on_step=curve)

    Called as `curve(step, value)` (more arguments are ignored). It draws at most twice a second, and on a slow
    machine less often: it waits ten times what the last picture took, so that drawing costs at most a tenth of the
    training. At the end it draws once more and adds first and last value to `alt`. With FINETUNE_LAB_LIVE=0 it draws
    only at the end.
    """

    def __init__(self, title: str, y: str = "loss (nats)", alt: str = "", every: float = 0.5):
        self.title, self.y, self.alt, self.every = title, y, alt or title, every
        self.steps: list[float] = []
        self.values: list[float] = []
        self._live = os.environ.get("FINETUNE_LAB_LIVE", "1") != "0"
        self._handle, self._drawn, self._pause = None, 0.0, every

    def __enter__(self) -> Self:
        return self

    def __call__(self, step, value, *_, **__) -> None:
        self.steps.append(float(step))
        self.values.append(float(value))
        if self._live and time.monotonic() - self._drawn >= self._pause:
            self._draw()

    def __exit__(self, *_) -> None:
        if self.steps:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        start = time.monotonic()
        figure = line(self.steps, self.values, self.title, "step", self.y)
        alt = f"{self.alt} From {self.values[0]:.3g} to {self.values[-1]:.3g} in {self.steps[-1]:.0f} steps."
        data, metadata = bundle(figure, alt)
        plt.close(figure)
        if self._handle is None:
            self._handle = display(data, metadata=metadata, raw=True, display_id=True)
        else:
            self._handle.update(data, metadata=metadata, raw=True)
        self._drawn = time.monotonic()
        self._pause = max(self.every, 10 * (self._drawn - start))
