"""`finetune-lab bench NAME`: the course's claims, measured on this machine against the library people use.

A bench is a module of this folder with NAME, HELP and run(quick) -> rows. A row is a dict of name, value, unit, peer,
peer_value, ratio, goal; `holds` is computed here: the ratio (or, without one, the value) against the goal ("<= 0.9").
Recorded runs are JSON files in `finetune_lab/evidence`, with machine, versions, seed, command and date.
"""

import argparse
import importlib
import json
import os
import re
from pathlib import Path

from finetune_lab.errors import UserError
from finetune_lab.provenance import provenance

BENCHES = {
    "distributed": "DDP, ZeRO-1 and FSDP2 in two processes: bytes each keeps, and the loss curve against one process",
    "dpo": "one DPO step: answers' tokens only, shared prompt, cheap reference, against TRL and full logits",
    "dpo_effects": "beta, rate, losses, noisy labels, length, mistakes: replies won, KL, log-probabilities, forgetting, five seeds",
    "levers": "checkpointing, LoRA, DoRA and compile: bytes saved for work and time, on ten layers of SmolLM2-135M's shape",
    "lora": "LoRA and DoRA: time and memory against peft and against the frozen layer alone",
    "loss": "loss at labelled positions only: speed and memory against full logits and TRL's fused head",
    "lora_effects": "rank, alpha, rate, targets, LoRA+, DoRA, full fine-tuning: learning, forgetting, spectra, five seeds",
    "merge": "finetune-lab merge against mergekit and a plain copy: GB/s of a core, peak memory, equal results",
    "merge_effects": "what merges keep of three skills: methods, scale, density, drop rate, bases, adapters, five seeds",
    "merge_smollm2": "two real LoRA runs of SmolLM2-135M, merged by the command: what each merge keeps of both skills",
    "masking": "right labels against every token, and against masked ends of turn: what each teaches, five seeds",
    "nf4": "NF4 against bitsandbytes on the CPU: speed, bits, errors of formats, block sizes and code books, faults",
    "packing": "packing against padding: token efficiency, step time, contamination; ours against TRL and transformers",
    "qlora": "QLoRA against LoRA, ways to merge, compute dtypes, and what a rounded base still knows, five seeds",
    "sft_effects": "learning rate, epochs, warm-up, schedule, batch, clipping, decay, NEFTune, fp16: what each does, five seeds",
    "vram": "the memory estimator against live bytes of real steps, byte by byte, and what the usual rules say",
    "world": "the tiny model: what the base knows, what fine-tuning teaches it, what it forgets",
}
EVIDENCE = Path(__file__).parents[2] / "evidence"
SEED = 0
COLUMNS = ("name", "value", "unit", "peer", "peer_value", "ratio", "goal", "holds")


def holds(row: dict) -> bool | None:
    """Whether the row's ratio (its value where it has none) meets its goal; None without a goal."""
    if row.get("goal") is None:
        return None
    match = re.fullmatch(r"(<=|>=) (\d+(?:\.\d+)?(?:e-?\d+)?)", row["goal"])
    if match is None:
        raise ValueError(f"goal {row['goal']!r} of row {row['name']!r} must read like '<= 0.9' or '>= 4'")
    figure = row["value"] if row.get("ratio") is None else row["ratio"]
    limit = float(match[2])
    return figure <= limit if match[1] == "<=" else figure >= limit


def measure(name: str, quick: bool = False) -> dict:
    """Run one bench; returns the shape that every bench and every recorded result has."""
    module = importlib.import_module(f"{__name__}.{name}")
    rows = [{column: row.get(column) for column in COLUMNS[:-1]} | {"holds": holds(row)} for row in module.run(quick)]
    return {
        "bench": name,
        "quick": quick,
        "command": f"finetune-lab bench {name}" + (" --quick" if quick else ""),
        **provenance(),
        "seed": SEED,
        "rows": rows,
    }


def recorded(name: str) -> dict:
    """The recorded run of a bench; raises UserError when none is kept."""
    path = EVIDENCE / f"{name}.json"
    if not path.is_file():
        raise UserError(f"no recorded run of bench {name!r}: make one with `finetune-lab bench {name} --record`")
    return json.loads(path.read_text())


def figure(name: str, row: str) -> dict:
    """One row of a recorded run by its name; raises UserError for a row that is not there."""
    for found in recorded(name)["rows"]:
        if found["name"] == row:
            return found
    raise UserError(f"the recorded run of bench {name!r} has no row {row!r}")


def _short(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(result: dict) -> str:
    """The rows as an aligned text table."""
    cells = [list(COLUMNS)] + [[_short(row[c]) for c in COLUMNS] for row in result["rows"]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, *summary(result["rows"])])


def summary(rows: list[dict]) -> list[str]:
    """How many goals hold, and the rows that miss theirs; nothing for a bench without goals."""
    missed = [row["name"] for row in rows if row["holds"] is False]
    goals = sum(row["holds"] is not None for row in rows)
    if not goals:
        return []
    return [f"\n{goals - len(missed)} of {goals} goals hold" + ("; missed:" if missed else "")] + missed


def _command(args: argparse.Namespace) -> int:
    if args.name == "list":
        print(json.dumps(BENCHES) if args.json else "\n".join(f"{n:8} {line}" for n, line in BENCHES.items()))
        return 0
    if args.name not in BENCHES:
        raise UserError(f"unknown bench {args.name!r}: choose one of {', '.join(BENCHES)} (`finetune-lab bench list`)")
    if args.record and args.quick:
        raise UserError("--record keeps full runs only: leave --quick away")
    result = recorded(args.name) if args.recorded else measure(args.name, args.quick)
    if args.record:
        path = EVIDENCE / f"{args.name}.json"
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(part, path)
    print(json.dumps(result, indent=1) if args.json else table(result))
    if args.recorded:
        return 0
    return 1 if any(row["holds"] is False for row in result["rows"]) else 0


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure the course's claims on this machine",
        description="Measure one claim of the course on this machine. Exit code 1 when a goal is missed (0 with --recorded).",
        epilog="example: finetune-lab bench world --quick --json",
    )
    parser.add_argument("name", metavar="NAME", help="a bench, or `list`")
    parser.add_argument("--quick", action="store_true", help="a small version, seconds instead of minutes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--recorded", action="store_true", help="print the recorded run instead of measuring")
    parser.add_argument("--record", action="store_true", help="keep the run in finetune_lab/evidence (authors)")
    parser.set_defaults(func=_command)
