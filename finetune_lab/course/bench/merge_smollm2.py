"""Bench `merge_smollm2`: two LoRA runs of SmolLM2-135M, one reads tickets and one does sums, merged by the command.

The runs lie in `runs/merge_smollm2` below the current folder; a run that is not there or not finished is trained first
(10 minutes of two cores each). Every merge is written by `lab.merging.merge`, loaded again, and scored on the held-out
rows of both runs, greedily, as in the runs' own reports. `--quick` does the same with the tiny model and short runs.
One seed and few rows: what a real pair does, not a claim about methods (five seeds: bench `merge_effects`).
"""

import json
import tempfile
from pathlib import Path

from finetune_lab.lab import merging, models, tasks
from finetune_lab.lab.evaluate import LONGEST_ANSWER
from finetune_lab.lab.finetune import build, preflight, runs, score, talk
from finetune_lab.lab.finetune.recipe import SftRecipe, load
from finetune_lab.lab.finetune.run import sft

NAME = "merge_smollm2"
HELP = "two real LoRA runs of SmolLM2-135M, merged by the command: what each merge keeps of both skills"

FULL = {"model": "smollm2-135m", "extract": {"items": 300, "lr": 1e-3, "epochs": 1.0, "batch_size": 2, "split": "combinations"},
        "math": {"items": 600, "epochs": 2.0, "batch_size": 8}, "all": {"precision": "bf16", "test_items": 50}}  # fmt: skip
QUICK = {"model": "tiny", "extract": {"steps": 60, "lr": 2e-3}, "math": {"steps": 60, "lr": 2e-3},
         "all": {"batch_size": 16, "test_items": 20}}  # fmt: skip
SKILLS = ("extract", "math")
WEIGHTS = {"linear": 0.5, "task_arithmetic": 1.0, "ties": 1.0, "dare_linear": 1.0, "dare_ties": 1.0}
DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}


def row(name: str, value: float, unit: str = "share", peer: str | None = None, peer_value: float | None = None) -> dict:
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": None,
        "goal": None,
    }


def specialists(size: dict, place: Path) -> dict[str, Path]:
    """{skill: folder of its finished run}, trained now where there is none."""
    folders = {}
    for skill in SKILLS:
        folders[skill] = place / skill
        if not (runs.read(folders[skill] / "run.json") or {}).get("finished"):
            settings = size[skill] | size["all"]
            sft(SftRecipe(model=size["model"], task=skill, out=str(folders[skill]), **settings), say=_silent)
    return folders


def recipes(size: dict, folders: dict[str, Path]) -> dict[str, dict]:
    """{name: config}: each specialist alone, and both merged every way."""
    base, both = size["model"], [str(folder) for folder in folders.values()]
    found = {
        f"specialist in {skill}": {"merge_method": "linear", "models": [_model(str(folder), 1.0)]}
        for skill, folder in folders.items()
    }
    for method, weight in WEIGHTS.items():
        own = {"density": DENSITY[method]} if method in DENSITY else {}
        found[method] = {"merge_method": method, "models": [_model(name, weight, **own) for name in both]}
        found[method] |= {} if method == "linear" else {"base_model": base}
    found["slerp"] = {"merge_method": "slerp", "base_model": both[0], "parameters": {"t": 0.5},
                      "models": [{"model": name} for name in both]}  # fmt: skip
    return {name: config | {"dtype": "float32"} for name, config in found.items()}


def exact_matches(model, tokenizer, found: dict) -> dict[str, float]:
    """Exact match of each skill on the held-out rows of its run. found: {skill: preflight of the run}."""
    scores = {}
    for skill, check in found.items():
        chats = [score.asked(row) for row in check.valid_rows]
        said = talk.answers(model, tokenizer, chats, max_new_tokens=LONGEST_ANSWER[skill])
        scores[skill] = tasks.score(skill, said, check.valid_rows)["exact_match"]
    return scores


def _model(name: str, weight: float, **own) -> dict:
    return {"model": name, "parameters": {"weight": weight, **own}}


def _silent(text: str) -> None:
    """What the runs say is in their logs."""


def measure(size: dict, place: Path) -> list[dict]:
    """All rows: the base, the specialists and the merges, one row a skill."""
    folders = specialists(size, place)
    found = {skill: preflight.inspect(load(SftRecipe, str(f / "recipe.yaml"), {})) for skill, f in folders.items()}
    reports = {skill: json.loads((f / "report.json").read_text()) for skill, f in folders.items()}
    dtype = build.DTYPES[found["math"].recipe.precision]  # as the runs scored themselves
    model, tokenizer = models.load(size["model"], dtype=dtype)
    rows = [row(f"{skill}: held-out rows", len(check.valid_rows), "count") for skill, check in found.items()]
    rows += [row(f"{skill}, base", value) for skill, value in exact_matches(model, tokenizer, found).items()]
    for name, config in recipes(size, folders).items():
        with tempfile.TemporaryDirectory() as folder:
            bill = merging.merge(config, Path(folder) / "merged", progress=False)
            model, tokenizer = models.load(str(Path(folder) / "merged"), dtype=dtype)
            for skill, value in exact_matches(model, tokenizer, found).items():
                rows.append(row(f"{skill}, {name}", value, "share", "its specialist, scored by its own run",
                                reports[skill]["after"]["exact_match"]))  # fmt: skip
        rows.append(row(f"{name}: CPU time of the merge", bill["cpu_seconds"], "s"))
    return rows


def run(quick: bool) -> list[dict]:
    """All rows; `quick` trains and merges the tiny model in a temporary folder."""
    if not quick:
        return measure(FULL, Path("runs") / NAME)
    with tempfile.TemporaryDirectory() as place:
        return measure(QUICK, Path(place))
