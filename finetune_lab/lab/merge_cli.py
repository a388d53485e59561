"""finetune-lab merge CONFIG.yml: merge models by a recipe, tensor by tensor, into a new model folder."""

import argparse
import json
import re
import sys
from pathlib import Path

EXAMPLES = """examples:
  finetune-lab merge recipes/merge_ties.yml --check      the plan and what was found; writes nothing
  finetune-lab merge recipes/merge_ties.yml --out merged/both
  finetune-lab generate --model merged/both "My lamp is broken."

The recipe is mergekit's YAML (linear, slerp, task_arithmetic, ties, dare_linear, dare_ties). A model is a folder, a
known name, a hub id, a run of `finetune-lab sft` (its adapter is added to its base on the way), or BASE+ADAPTER.
Unlike mergekit: dtype is that of the file only, as the arithmetic is always fp32; DARE's `rescale` divides by the
density, as in the paper; parameters that a method does not use are refused, and so is a density or t outside of 0 to 1."""


def register(subparsers) -> None:
    """Add the command `merge` to the command line."""
    line = "merge models by a recipe, without training"
    parser = subparsers.add_parser(
        "merge", help=line, description=line, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="recipe, mergekit's YAML")
    parser.add_argument(
        "--out", metavar="DIR", help="new folder of the merged model (default: merged/NAME of the recipe)"
    )
    parser.add_argument("--check", action="store_true", help="check everything and show the plan; write nothing")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of DARE's random choices (default: 0)")
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="largest file, such as 500MB (default: 5GB)"
    )
    parser.add_argument("--json", action="store_true", help="print the report (with --check: the plan) as JSON")
    parser.set_defaults(func=merge)


def merge(args) -> int:
    """0: merged, or nothing stands against it; UserError (exit code 2) in one sentence else."""
    from finetune_lab.lab import merging
    from finetune_lab.lab.merging import checks, write

    shard_bytes = read_size(args.shard_size)
    out = Path(args.out or Path("merged") / Path(args.config).stem).expanduser()
    if not args.check:
        write.check_free(out)
    plan = merging.plan(args.config)
    checks.room_on_disk(out, plan.bytes_written)
    found = merging.describe(plan)
    if args.check:
        print(json.dumps(found, indent=1) if args.json else "\n".join([*lines(found), "nothing was written."]))
        return 0
    for text in lines(found):
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)
    report = merging.carry_out(plan, out, seed=args.seed, shard_bytes=shard_bytes)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{report['out']}: {', '.join(report['files'])}, {report['seconds']:.1f} s")
        print(f'ask it: finetune-lab generate --model {report["out"]} "your prompt"')
    return 0


def lines(found: dict) -> list[str]:
    """The plan for people."""
    written = f"{found['dtype']} ({_size(found['bytes_written'])})"
    size = f"{found['tensors']} tensors of {found['layers']} layers, {found['parameters']:,} parameters"
    out = [f"{found['merge_method']}: {size}, to be written in {written}"]
    for model in found["models"]:
        kind = "base" if model["base"] else "adapter" if model["adapter"] else "model"
        out.append(
            f"{kind}: {model['model']}, {_size(model['bytes'])}" + (f" ({model['from']})" if model["from"] else "")
        )
    return out + [f"warning: {warning}" for warning in found["warnings"]]


def read_size(text: str) -> int:
    """Bytes in a text such as 500MB or 5GB (decimal, as on the hub). Raises UserError."""
    from finetune_lab.errors import UserError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--shard-size is {text!r}: give a size such as 500MB or 5GB.")
    return int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
