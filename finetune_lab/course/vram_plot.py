"""Pictures of the ledger: stacked bars with the card's line, memory through one step, and the explorer of lesson 02.

    Explorer(vram_plot.explore, alt="...", model=Dropdown(...), method=Dropdown(...), seq=IntSlider(...), ...)

Categories carry a colour, a hatch and a direct label, so nothing is said by colour alone. Sizes in GB = 10^9 bytes.
"""

from matplotlib import rc_context
from matplotlib.figure import Figure

from finetune_lab.course import plots, vram_report
from finetune_lab.methods.memory import Ledger, Recipe, estimate, from_config
from finetune_lab.methods.memory.presets import GPUS, PRESETS

GREY = "#767676"
# from the bottom, what stands, then what comes and goes: (edge, hatch), no pair twice
LOOK = {
    "weights": (plots.BLUE, ""),
    "quantisation state": (plots.PURPLE, "///"),
    "reference model": (GREY, "..."),
    "other models": (GREY, "xxx"),
    "adapters": (plots.GREEN, "\\\\\\"),
    "master weights": (plots.PURPLE, "..."),
    "optimizer": (plots.BLUE, "///"),
    "gradients": (plots.PURPLE, "xxx"),
    "KV cache": (GREY, "\\\\\\"),
    "activations": (plots.VERMILLION, "..."),
    "logits": (plots.GREEN, "xxx"),
    "temporaries": (GREY, "///"),
}
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.9}
SHOWN = 0.03  # a part smaller than this share of the picture's height has no label of its own


def stack(ledgers: dict[str, Ledger], title: str, limit: tuple[str, int] | None = None) -> Figure:
    """One bar a ledger, its categories at the peak stacked, what the device takes itself on top; `limit`: (card, bytes)."""
    figure, ax = plots.axes(title, "", "GB at the peak", size=(6.4, 3.8))
    sizes = [ledger.total_on_device for ledger in ledgers.values()]
    tallest = max([*sizes, limit[1]] if limit else sizes) / 1e9
    for x, ledger in enumerate(ledgers.values()):
        alive = ledger.categories()
        parts = [(category, alive[category]) for category in LOOK if category in alive]
        parts.append(("CUDA context and allocator", ledger.total_on_device - ledger.peak))
        base, above = 0.0, -1.0
        for category, size in parts:
            colour, hatch = LOOK.get(category, (plots.BLACK, ""))
            high = size / 1e9
            ax.bar(x, high, 0.38, base, color="white", edgecolor=colour, hatch=hatch, linewidth=1.2)
            if high >= SHOWN * tallest:
                y = max(base + high / 2, above)
                ax.annotate(f"{category} {_short(high)}", (x + 0.21, y), va="center", fontsize=8, bbox=BOX, zorder=4)
                above = y + 0.055 * tallest
            base += high
        ax.annotate(f"{_short(base)} GB", (x, base), (0, 5), textcoords="offset points", ha="center", weight="bold",
                    bbox=BOX)  # fmt: skip
    if limit:
        size = limit[1] / 1e9
        ax.axhline(size, color=plots.BLACK, linestyle="--", linewidth=1.2)
        _name_limit(ax, f"{limit[0]}: {size:.3g} GB", size)
    ax.set_xticks(range(len(ledgers)), list(ledgers))
    ax.set_xlim(-0.4, len(ledgers) - 0.2)
    ax.set_ylim(0, 1.14 * tallest)
    ax.grid(axis="x", visible=False)
    return figure


def timeline(ledger: Ledger, title: str, limit: tuple[str, int] | None = None) -> Figure:
    """Memory through one step, categories stacked; each is named where it is thickest, the peak is marked."""
    figure, ax = plots.axes(title, "", "GB alive", size=(6.4, 3.8))
    steps = ledger.timeline()
    xs = [x + side for x in range(len(steps)) for side in (-0.5, 0.5)]
    base = [0.0] * len(xs)
    tallest = ledger.peak / 1e9
    with rc_context(plots.STYLE):
        for category, (colour, hatch) in LOOK.items():
            values = [alive.get(category, 0) / 1e9 for _, alive in steps for _ in (0, 1)]
            if not any(values):
                continue
            top = [low + value for low, value in zip(base, values, strict=True)]
            ax.fill_between(xs, base, top, facecolor="white", edgecolor=colour, hatch=hatch, linewidth=0.8)
            thick = max(range(len(xs)), key=lambda n: values[n])
            if values[thick] > 0.04 * tallest:
                place = (xs[thick] + 0.5, base[thick] + values[thick] / 2)
                ax.annotate(category, place, ha="center", va="center", fontsize=8, bbox=BOX)
            base = top
    names = [moment for moment, _ in steps]
    peak = names.index(ledger.peak_moment)
    ax.annotate(
        f"peak {_short(tallest)} GB", (peak, tallest), (0, 4), textcoords="offset points", ha="center", weight="bold"
    )
    if limit:
        ax.axhline(limit[1] / 1e9, color=plots.BLACK, linestyle="--", linewidth=1.2)
        _name_limit(ax, limit[0], limit[1] / 1e9)
        tallest = max(tallest, limit[1] / 1e9)
    every = max(1, -(-len(names) // 10))
    marks = sorted({peak, *(n for n in range(0, len(names), every) if abs(n - peak) >= every)})
    ax.set_xticks(marks, [names[n] for n in marks], rotation=30, ha="right", fontsize=8)
    ax.set_xlim(-0.5, len(steps) - 0.5)
    ax.set_ylim(0, 1.14 * tallest)
    return figure


def _short(size: float) -> str:
    """Three digits, and never 1.12e+03."""
    return f"{size:,.0f}" if size >= 999.5 else f"{size:.3g}"


def _name_limit(ax, text: str, size: float) -> None:
    """The card's name at the right end of its line, where no bar stands."""
    ax.annotate(text, (1, size), (-2, 3), xycoords=ax.get_yaxis_transform(), textcoords="offset points", ha="right",
                fontsize=8, bbox=BOX)  # fmt: skip


def explore(
    model: str = "llama-3.1-8b",
    method: str = "lora",
    seq: int = 2048,
    batch: int = 1,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    gpu: str = "RTX-4090",
) -> tuple[Figure, str]:
    """(stacked bar beside the card's line, one line of text) of a preset: the pure function behind the explorer."""
    architecture = from_config(PRESETS[model], model)
    recipe = Recipe(method=method, seq=seq, batch=batch, checkpointing=checkpointing, optimizer=optimizer)
    ledger = estimate(architecture, recipe)
    fits = ledger.total_on_device <= GPUS[gpu]
    title = f"{model}, {method}: {'fits' if fits else 'does not fit'} on {gpu}"
    text = f"{vram_report.summary(ledger)}\n{vram_report.verdict(ledger, gpu, GPUS[gpu])}"
    return stack({f"batch {batch} x {seq} tokens": ledger}, title, (gpu, GPUS[gpu])), text
