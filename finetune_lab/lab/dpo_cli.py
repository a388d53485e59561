"""finetune-lab dpo CONFIG|flags: train on preferences (pairs, or answers with a thumb), and get a report."""

import argparse
from pathlib import Path

from finetune_lab.lab.sft_cli import add_run_flags, add_settings, recipe_of, run_command, speaker

EXAMPLES = """examples:
  finetune-lab dpo --task reply                           the tiny model first learns to write letters, then good ones
  finetune-lab dpo --data pairs.jsonl --adapter runs/my-sft --hold-out 0.1 --check
  finetune-lab dpo --data thumbs.jsonl --adapter runs/my-sft --loss kto
  finetune-lab dpo recipes/reply_dpo.yaml --beta 0.3 --out runs/second

Data: {"prompt", "chosen", "rejected"}, or {"prompt", "completion", "label": true} for kto. The reference is the model at
the start of this run. A killed run goes on when the same command is given again; a flag wins over the file."""


def register(subparsers) -> None:
    """Add the command `dpo` to the command line."""
    from finetune_lab.lab.finetune.dpo_recipe import DpoRecipe

    line = "train on preferences (DPO, IPO, KTO), and get a report"
    parser = subparsers.add_parser(
        "dpo", help=line, description=line, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file with settings")
    add_settings(parser, DpoRecipe)
    add_run_flags(parser)
    parser.set_defaults(func=dpo)


def dpo(args) -> int:
    """0 trained (or finished before, or nothing wrong found by --check), 1 --check found what forbids training."""
    from finetune_lab.lab.finetune import preflight_dpo, runs
    from finetune_lab.lab.finetune.dpo_recipe import DpoRecipe

    recipe, inspect, also = recipe_of(args, DpoRecipe), preflight_dpo.inspect, {}
    if recipe.task and recipe.model == "tiny" and recipe.adapter is None:
        first = first_stage(recipe)
        if not args.check:
            train_first(first, args)
        if (runs.read(Path(first.out).expanduser() / "run.json") or {}).get("finished"):
            args.adapter = first.out
            recipe = recipe_of(args, DpoRecipe)
        else:
            recipe, inspect, also = recipe.after_a_start(), preflight_dpo.inspect_second, check_first(first, args)
            if not args.json:
                print(f"stage 2, in {recipe.out}: preference training goes on with the adapter of stage 1")

    def train(recipe, found, say) -> dict:
        from finetune_lab.lab.finetune import dpo as trainer  # TRL takes seconds to import: --check does without

        return trainer.dpo(recipe, fresh=args.fresh, say=say, found=found)

    return run_command(args, recipe, inspect, train, also=also)


def first_stage(recipe):
    """The recipe of the run beside this one that teaches the tiny model, a bare base, to write letters at all."""
    from finetune_lab.errors import UserError
    from finetune_lab.lab.finetune.recipe import SftRecipe

    if recipe.method == "full":
        raise UserError(
            "the tiny model cannot write letters yet: run `finetune-lab sft --task reply --method full` first, and give "
            "the folder `model` of that run as --model."
        )
    same = ("task", "method", "rank", "alpha", "targets", "seed", "precision", "test_items")
    values = {name: getattr(recipe, name) for name in same}
    return SftRecipe(model="tiny", out=f"{recipe.out or 'runs/' + recipe.name()}-start", **values)


def train_first(recipe, args) -> None:
    """Make the start if need be."""
    from finetune_lab.lab.finetune import run

    say = speaker(args)
    say(f"the tiny model cannot write letters yet: supervised fine-tuning comes first, in {recipe.out}")
    run.sft(recipe, say=say)


def check_first(recipe, args) -> dict:
    """Look at the start that would be trained: printed in two lines, or returned for the JSON of --check."""
    from finetune_lab.lab.finetune import preflight

    found = preflight.inspect(recipe)
    if not args.json:
        print(
            f"stage 1, in {recipe.out}: the tiny model cannot write letters yet, so supervised fine-tuning comes first"
        )
        print("  " + preflight.lines(found)[0])
    return {"start": found.as_dict()}
