"""Which method? The decision as data, as a picture, and as a chooser.

Two ladders of questions: how to train the weights, and whether a preference method follows. The first yes ends a
ladder. What fits is computed from the model's size, the card and the tokens it holds at once, never read off a table
of cards: 80 GB train an 8B model in full nowhere near. The number of tasks is not asked, because it changes no memory.

`bill` is an estimate for dense models of Llama's shape. Sources: ZeRO (1910.02054) for 16 bytes a parameter, QLoRA
(2305.14314) for 4.127 bits, Korthikanti et al. (2205.05198) for 34 bytes a token and width in one layer.
"""

import functools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from ipywidgets import Checkbox, Dropdown, SelectionSlider
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from finetune_lab.course import plots, topics
from finetune_lab.course.explorer import Explorer
from finetune_lab.methods.counts import nf4_bits_per_parameter

USABLE = 0.92  # of the card: the rest goes to the driver's context and to gaps between blocks
FEEDBACK = {
    "none needed: good answers to imitate": "imitate",
    "a program can check an answer": "check",
    "pairs: this answer is better than that": "pairs",
    "single answers marked good or bad": "labels",
    "preferences matter, none collected yet": "missing",
}


@dataclass(frozen=True)
class Situation:
    """What the decision depends on. Sizes in billions of parameters, memory of one card in GB (10**9 bytes)."""

    billions: float = 8
    memory: float = 24
    devices: int = 1
    tokens: int = 2048  # on one card at once: rows times length
    vocabulary: int = 128_256
    prompt_is_enough: bool = False
    far_and_much: bool = False
    feedback: str = "imitate"


@functools.cache
def _topics() -> dict[str, topics.Topic]:
    return {topic.id: topic for topic in topics.load()}


@dataclass(frozen=True)
class Leaf:
    """An answer, and the topic whose lesson holds the evidence."""

    name: str
    topic: str

    @property
    def evidence(self) -> str:
        """`00 Start here: What it cost and what it forgot`, or `03 LoRA and DoRA (planned)`."""
        topic = _topics()[self.topic]
        place = f": {topic.section}" if topic.status == "written" else f" ({topic.status})"
        return f"{topic.lesson} {topic.title}{place}"


@dataclass(frozen=True)
class Rung:
    """A question, its leaf when the answer is yes, and the answer with its reason for a situation."""

    question: str
    yes: Leaf
    ask: Callable[[Situation], tuple[bool, str]]


@dataclass(frozen=True)
class Ladder:
    title: str
    rungs: tuple[Rung, ...]
    otherwise: Leaf


def bill(now: Situation) -> dict[str, float]:
    """GB on each card for "full", "LoRA" (rank 16, all linear layers) and "QLoRA", states sharded over the cards.

    Width from the size: 2048 * billions^(1/3) (4096 at 8B); adapter: 0.0091 * billions^0.75 billion parameters (41.9
    million at 8B). Activations with checkpointing, attention without its matrix, logits and their gradient in fp32.
    """
    width = 2048 * now.billions ** (1 / 3)
    matrices = 1 if now.billions < 4 else 2  # small models use the embedding as their output layer
    rest = min(matrices * now.vocabulary * width / 1e9, 0.6 * now.billions)
    layers = (now.billions - rest) * 1e9 / (13 * width**2)
    adapter = 16 * 0.0091 * now.billions**0.75
    activations = now.tokens * (2 * width * layers + 34 * width + 8 * now.vocabulary) / 1e9
    four_bit = (now.billions - rest) * nf4_bits_per_parameter(64, 256) / 8 + 2 * rest
    states = {"full": 16 * now.billions, "LoRA": 2 * now.billions + adapter, "QLoRA": four_bit + adapter}
    return {name: state / now.devices + activations for name, state in states.items()}


def _fits(name: str) -> Callable[[Situation], tuple[bool, str]]:
    def ask(now: Situation) -> tuple[bool, str]:
        need, room = bill(now)[name], USABLE * now.memory
        return need <= room, f"{name} needs about {need:.3g} GB a card, {room:.3g} GB are usable"

    return ask


def _full(now: Situation) -> tuple[bool, str]:
    if not now.far_and_much:
        return False, "the task is near pre-training or the data are few: full fine-tuning would only forget more"
    return _fits("full")(now)


def _feedback(kind: str, yes: str, no: str) -> Callable[[Situation], tuple[bool, str]]:
    return lambda now: (True, yes) if now.feedback == kind else (False, no)


TRAIN = Ladder(
    "Which weights are trained?",
    (
        Rung("Do a better prompt, examples in it or retrieval do the job?", Leaf("No fine-tuning", "when-to-fine-tune"),
             lambda now: (now.prompt_is_enough, "you tried" if now.prompt_is_enough else "you tried, and they do not")),
        Rung("Much data, far from pre-training, and 16 bytes a parameter fit?",
             Leaf("Full fine-tuning", "full-fine-tuning"), _full),
        Rung("Do 2 bytes a parameter, the adapter and activations fit?", Leaf("LoRA", "lora"), _fits("LoRA")),
        Rung("Does the base fit in 4 bits?", Leaf("QLoRA", "qlora"), _fits("QLoRA")),
    ),
    Leaf("Smaller model or more cards", "gpu-sizing"),
)  # fmt: skip
PREFER = Ladder(
    "What follows SFT?",
    (
        Rung("Is it enough to imitate good answers?", Leaf("Stop after SFT", "trl-sft"),
             _feedback("imitate", "good answers are all you have, and all you need", "better and worse matter as well")),
        Rung("Can a program check an answer?", Leaf("GRPO", "grpo"), _feedback("check", "its verdict is the reward", "no program tells right from wrong")),
        Rung("Are there pairs, better and worse?", Leaf("DPO or IPO", "dpo"), _feedback("pairs", "DPO needs nothing else", "no pairs were collected")),
        Rung("Are single answers marked good or bad?", Leaf("KTO", "kto"), _feedback("labels", "KTO needs no pairs", "there are no labels")),
    ),
    Leaf("Collect preferences first", "alignment-choice"),
)  # fmt: skip


def walk(ladder: Ladder, now: Situation) -> tuple[int, Leaf, list[str]]:
    """Climb down until the first yes. Returns the rung's number (len(rungs) when all say no), the leaf, the reasons."""
    reasons = []
    for at, rung in enumerate(ladder.rungs):
        yes, reason = rung.ask(now)
        reasons.append(f"{'yes' if yes else 'no '}  {rung.question} ({reason})")
        if yes:
            return at, rung.yes, reasons
    return len(ladder.rungs), ladder.otherwise, reasons


def choose(now: Situation) -> list[Leaf]:
    """The method, and what follows it; one leaf when no fine-tuning is needed."""
    leaf = walk(TRAIN, now)[1]
    return [leaf] if leaf.name == "No fine-tuning" else [leaf, walk(PREFER, now)[1]]


def explain(now: Situation) -> str:
    """The path through both ladders in words, with the lesson that holds the evidence."""
    lines = []
    for ladder in (TRAIN, PREFER)[: len(choose(now))]:
        _, leaf, reasons = walk(ladder, now)
        lines += [ladder.title, *(f"  {reason}" for reason in reasons), f"  -> {leaf.name}. Lesson {leaf.evidence}", ""]
    return "\n".join(lines).strip()


def picture(now: Situation | None = None) -> Figure:
    """Both ladders; with a situation, its path is drawn thick and dark and the rest thin and grey."""
    with matplotlib.rc_context(plots.STYLE):
        figure = matplotlib.figure.Figure(figsize=(8.6, 4.7), layout="constrained")
        steps = len(choose(now)) if now else 2
        for ax, ladder, live in zip(figure.subplots(1, 2), (TRAIN, PREFER), (True, steps == 2), strict=True):
            ax.set_axis_off()
            ax.set(xlim=(0, 10), ylim=(0.05, 5), title=ladder.title)
            _draw(ax, ladder, None if now is None else walk(ladder, now)[0] if live else -1)
    return figure


def _draw(ax, ladder: Ladder, stop: int | None) -> None:
    """Questions down the left, answers on the right. `stop`: the rung that says yes; -1 nothing, None everything."""
    last = len(ladder.rungs)
    for at, rung in enumerate(ladder.rungs):
        y = 4.5 - at
        asked, taken = stop is None or at <= stop, stop is None or at == stop
        _box(ax, 0.1, y, 5.3, rung.question, plots.BLUE, asked, 31)
        _box(ax, 6.6, y, 3.3, _label(rung.yes), plots.GREEN, taken, 22)
        _arrow(ax, (5.5, y), (6.5, y), "yes", taken)
        _arrow(ax, (2.7, y - 0.36), (2.7, y - 0.64), "no", stop is None or at < stop)
    _box(ax, 0.1, 4.5 - last, 5.3, _label(ladder.otherwise), plots.VERMILLION, stop is None or stop == last, 34)


def _label(leaf: Leaf) -> str:
    lesson, _, rest = leaf.evidence.partition(" ")
    return f"{leaf.name}\nlesson {lesson}{' (planned)' if rest.endswith('(planned)') else ''}"


def _box(ax, x: float, y: float, width: float, text: str, colour: str, live: bool, wrap: int) -> None:
    shape = FancyBboxPatch((x, y - 0.34), width, 0.68, boxstyle="round,pad=0,rounding_size=0.12", facecolor="white",
                           edgecolor=colour if live else "#767676", linewidth=2.2 if live else 0.8)  # fmt: skip
    ax.add_patch(shape)
    lines = "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, wrap, break_on_hyphens=False))
    ax.text(x + width / 2, y, lines, ha="center", va="center", fontsize=8.5, color="black" if live else "#767676")


def _arrow(ax, start: tuple, end: tuple, label: str, live: bool) -> None:
    colour, thick = ("black", 1.8) if live else ("#767676", 0.8)
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": thick})
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    beside = (0, 4) if start[1] == end[1] else (12, -3)
    ax.annotate(label, middle, beside, textcoords="offset points", ha="center", fontsize=8, color=colour)


def plot(size: float, memory: float, cards: int, tokens: int, prompt: bool, far: bool, feedback: str):
    """(picture, text) of one situation, for the chooser."""
    now = Situation(size, memory, cards, tokens, prompt_is_enough=prompt, far_and_much=far, feedback=feedback)
    return picture(now), explain(now)


def chooser() -> Explorer:
    """The interactive chooser: the last line of a notebook cell."""
    wide = {"style": {"description_width": "220px"}, "layout": {"width": "620px"}}

    def slider(options: list, value: float, description: str) -> SelectionSlider:
        return SelectionSlider(options=options, value=value, description=description, **wide)

    return Explorer(
        plot,
        alt="Two ladders of questions; the path for the chosen situation is drawn thick.",
        size=slider([0.135, 0.6, 1, 3, 8, 14, 33, 70], 8, "model, billion parameters"),
        memory=slider([8, 12, 16, 24, 48, 80, 141], 24, "memory of one card, GB"),
        cards=slider([1, 2, 4, 8, 16], 1, "cards"),
        tokens=slider([512, 1024, 2048, 4096, 8192, 16384], 2048, "tokens on a card at once"),
        prompt=Checkbox(False, description="a prompt or retrieval is enough", **wide),
        far=Checkbox(False, description="much data, far from pre-training", **wide),
        feedback=Dropdown(options=FEEDBACK, value="imitate", description="feedback", **wide),
    )
