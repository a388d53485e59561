"""The package in one picture, drawn from its own imports: `docs/architecture.svg`.

    python -m finetune_lab.course.architecture        # draws it again; a test holds that it is current

Three rooms; imports point down only (`tests/test_rooms.py`). A name is a module; a name with a number is a folder with
that many. The marks before a name say which other rooms it imports: ○ lab, × methods.
"""

import ast
import io
from collections import Counter
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from finetune_lab.course import plots
from finetune_lab.course.lessons import course_root, write_atomic

PACKAGE = Path(__file__).resolve().parents[1]
# room -> what it is; from the top down, as the imports point
ROOMS = {
    "course": "the teaching machine: checks, builder, runner, drills, pictures, benches",
    "lab": "the ground: models, the tiny world, data, training (transformers, peft, trl)",
    "methods": "the algorithms: one idea a module, torch and math only",
}
MARKS = {"lab": "○", "methods": "×"}
COLOURS = {"course": plots.BLUE, "lab": plots.VERMILLION, "methods": plots.GREEN}
COLUMNS, STEP = 6, 0.19  # names side by side; inches a line


def imports(path: Path, source: str | None = None) -> set[str]:
    """The modules of this package that a file imports, anywhere in it; relative imports are resolved."""
    found = set()
    package = ["finetune_lab", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(source if source is not None else path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module or "") if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == "finetune_lab"}
    return found


def room(module: str) -> str:
    """`finetune_lab.lab.models` -> `lab`; a module at the top -> ``."""
    name = (module.split(".") + [""])[1]
    return name if name in ROOMS else ""


def names(own: str) -> list[tuple[str, set[str]]]:
    """(name, other rooms that it imports) of a room's modules and folders, by name; a folder's name has its number."""
    rooms, count = {}, Counter()
    for path in (PACKAGE / own).rglob("*.py"):
        name = path.relative_to(PACKAGE / own).parts[0].removesuffix(".py")
        if name != "__init__":
            count[name] += path.name != "__init__.py" and path.parent != PACKAGE / own
            rooms.setdefault(name, set()).update(room(module) for module in imports(path))
    return [(f"{name} ({count[name]})" if count[name] else name, rooms[name] - {own, ""}) for name in sorted(rooms)]


def draw() -> Figure:
    """The picture. Sizes are inches; the height follows from the number of modules."""
    lines = {own: -(-len(names(own)) // COLUMNS) for own in ROOMS}
    height = sum(0.75 + STEP * n for n in lines.values()) + 0.75
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(10, height))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, 10), ylim=(height, 0))
        ax.axis("off")
        ax.text(0.15, 0.32, "Imports point one way: course → lab → methods", fontsize=13, weight="bold")
        y = 0.5
        for own, what in ROOMS.items():
            every, tall = names(own), 0.45 + STEP * lines[own]
            box = FancyBboxPatch(
                (0.15, y), 9.7, tall, "round,pad=0,rounding_size=0.08", fc="none", ec=COLOURS[own], lw=1.8
            )
            ax.add_patch(box)
            modules = sum(path.name != "__init__.py" for path in (PACKAGE / own).rglob("*.py"))
            ax.text(0.28, y + 0.24, own, fontsize=11, weight="bold", color=COLOURS[own])
            ax.text(1.15, y + 0.24, f"{what}; {modules} modules", fontsize=9)
            for i, (name, others) in enumerate(every):
                column, line = divmod(i, lines[own])
                x, below = 0.28 + 1.6 * column, y + 0.5 + STEP * line
                for place, (other, mark) in enumerate(MARKS.items()):
                    if other in others:
                        ax.text(x + 0.11 * place, below, mark, fontsize=7.5, weight="bold", color=COLOURS[other])
                ax.text(x + 0.25, below, name, fontsize=7.5)
            y += tall + 0.3
            if own != "methods":
                ax.annotate("", (5, y - 0.02), (5, y - 0.28), arrowprops={"arrowstyle": "-|>", "lw": 1.8})
        ax.text(0.15, y + 0.02, "○ imports lab, × imports methods; (n) a folder of n modules", fontsize=9)
    return figure


def svg() -> str:
    """The picture as text: the same imports give the same bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "finetune-lab"}):
        draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    picture = course_root() / "docs" / "architecture.svg"
    write_atomic(picture, svg())
    print(f"drew {picture.relative_to(course_root())}")
