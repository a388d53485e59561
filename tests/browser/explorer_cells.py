"""Every explorer of the course and the drills, as their cells stand in `solutions/`, in one notebook.

`BEFORE` gives the names that a cell takes from earlier cells of its lesson, with a small stand-in for what the lesson trains.
"""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
DRILLS = re.compile(r"^Drills\(minutes", re.MULTILINE)
EXPLORER = re.compile(r"^(Explorer\(|decision\.chooser\(\))", re.MULTILINE)
BEFORE = {
    "01": """
from finetune_lab.lab.models import load
from finetune_lab.methods import chat
_, tokenizer = load()
fmt, encode, render_chat = chat.chat_format(tokenizer), chat.text_encoder(tokenizer), chat.render_chat
messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
questions = [{"prompt": messages[:1], "completion": messages[1:]}] * 2
""",
    "02": """
from finetune_lab.methods.memory import from_config
from finetune_lab.methods.memory.presets import PRESETS
""",
    "03": """
import torch
paths, updates = ["a layer"], {"a layer": torch.randn(64, 48, generator=torch.Generator().manual_seed(0))}
""",
    "05": """
import math
from finetune_lab.course import plots
from finetune_lab.methods import schedules
from finetune_lab.methods.schedules import cosine
""",
    "06": """
from finetune_lab.course import bench
rows = {row["name"]: row["value"] for row in bench.recorded("dpo_effects")["rows"]}
BETAS, TOO_FAR = {beta: f"dpo beta={beta:g} lr=0.0001" for beta in (0.1, 1, 10)}, "dpo beta=0.1 lr=0.0003"
def found(setting, measure):
    return rows[f"{setting}: {measure}"], rows[f"{setting}: {measure}, standard deviation"]
""",
    "07": """
import torch
from finetune_lab.course import plots
from finetune_lab.lab import forced, tasks
from finetune_lab.lab.models import load
from finetune_lab.methods import merging
model, tokenizer = load()
base, SKILLS = forced.weights_of(model), ("extract", "answer", "math")
torch.manual_seed(0)
specialists = {skill: {n: w + 0.01 * w.std() * torch.randn_like(w) for n, w in base.items()} for skill in SKILLS}
some = {skill: tasks.load_task(skill, "validation", 4) for skill in SKILLS}
""",
    "16": """
from finetune_lab.course import decision
""",
}


def cells(wanted: re.Pattern) -> dict[str, nbformat.NotebookNode]:
    """Lesson number -> its cell that is wanted, with the outputs of the executed solution."""
    found = {}
    for path in sorted((ROOT / "solutions").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and wanted.search(cell.source):
                found[path.name[:2]] = cell
    return found


CELLS = cells(EXPLORER)
(DRILL,) = cells(DRILLS).values()


def write(path: Path) -> None:
    """The notebook: two cells a lesson, what the explorer needs and the explorer; then the drills."""
    code = [part for lesson, cell in CELLS.items() for part in (BEFORE.get(lesson, "pass"), cell.source)]
    code += ["from finetune_lab.course.drills.widget import Drills", DRILL.source]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in code])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(notebook, path)


def cell_of(lesson: str) -> int:
    """Which code cell of the notebook holds the explorer of a lesson."""
    return 2 * list(CELLS).index(lesson) + 1
