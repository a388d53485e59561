"""The model card of a merge: what was merged, how, and where each model came from. README.md of the merged folder."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune_lab import __version__
from finetune_lab.lab.hub import looks_like_id
from finetune_lab.lab.merging.checkpoint import Checkpoint
from finetune_lab.lab.merging.layout import Plan
from finetune_lab.lab.merging.parameters import METHODS


def card(plan: Plan, name: str, seed: int) -> str:
    """The card as Markdown, with the header that the hub reads."""
    config, method = plan.config, METHODS[plan.config.method]
    names = list(plan.models)
    bases = [name for name in names if looks_like_id(name) and not Path(name).exists()]  # what the hub can look up
    head = ["---", *(["base_model:", *(f"- {base}" for base in bases)] if bases else []), "library_name: transformers"]
    head += ["tags:", "- merge", "- finetune-lab", "---"]
    paper = f" ([arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv}))" if method.arxiv else ""
    drawn = f" Entries are dropped at random, with seed {seed}." if config.method.startswith("dare") else ""
    out = [*head, "", f"# {name}", ""]
    onto = method.base and config.method != "slerp"  # slerp's base is one of the two
    count = len(names) - onto
    what = f"{count} model{'s' * (count != 1)} merged" + (f" onto the base {config.base}" if onto else "")
    out += [f"{what} by {method.title}{paper}, without training.{drawn}", ""]
    out += ["| model | role | parameters | stored as | from |", "| --- | --- | --- | --- | --- |"]
    out += [_row(plan, model) for model in plan.models.values()]
    out += ["", "## Recipe", "", *_fenced(config.text.strip(), "yaml"), ""]
    again = "finetune-lab merge PATH/merge.yml --out NEW" + (f" --seed {seed}" if drawn else "")
    out += [f"`merge.yml` beside this card is the same text: `{again}` makes this model again.", ""]
    if paths := [name for name in names if any(_is_relative(part) for part in (name, *name.split("+")))]:
        out[-1:] = [
            f"Start it in the folder where this merge was run: {', '.join(paths)} {'count' if paths[1:] else 'counts'} from there.",
            "",
        ]
    if plan.warnings:
        out += ["## Warnings of the check", "", *(f"- {warning}" for warning in plan.warnings), ""]
    made = f"finetune-lab {__version__}, torch {torch.__version__}; arithmetic in fp32, rounded once"
    out += ["## Made by", "", f"{made} to {str(plan.tensors[0].dtype).removeprefix('torch.')}.", ""]
    return "\n".join(out)


def provenance_of(model: Checkpoint) -> str:
    """Where a model came from, in a few words: the run that trained it, or its commit on the hub."""
    run = model.adapter_folder.parent if model.adapter_folder else model.folder.parent
    facts = []
    try:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        recipe = report["recipe"]
        facts.append(f"{recipe['method']} on {recipe['task'] or Path(recipe['data']).name}, {report['date']}")
        for key, words in (("exact_match", "exact match"), ("good", "good answers")):
            before, after = (report[when].get(key) for when in ("before", "after"))
            if before is not None and after is not None:
                rows = recipe["task"] or Path(recipe["data"]).name
                facts.append(f"{words} on held-out rows of {rows} {before:.0%} to {after:.0%}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if run.name == "snapshots":
        facts.append(f"commit {model.folder.name[:12]}")
    return "; ".join(facts)


def _is_relative(name: str) -> bool:
    return not Path(name).is_absolute() and not name.startswith("~") and Path(name).exists()


def _row(plan: Plan, model: Checkpoint) -> str:
    role = "base" if model.name == plan.config.base else "model"
    role += f", adapter of {model.on}" if model.on else ""
    count = sum(t.nbytes // t.dtype.itemsize for t in model.tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in model.tensors.values()})
    size = f"{model.bytes / 1e9:.2f} GB, {', '.join(dtypes)}"
    cells = [model.name, role, f"{count:,}", size, provenance_of(model)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _fenced(text: str, language: str) -> Sequence[str]:
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + language, text, fence]
