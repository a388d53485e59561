"""finetune-lab sft CONFIG|flags: fine-tune a model on a task or on your own data, and get a report."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable

EXAMPLES = """examples:
  finetune-lab sft --task extract                         the tiny model learns tickets, half a minute
  finetune-lab sft --data tickets.jsonl --hold-out 0.1 --check
  finetune-lab sft recipe.yaml --lr 1e-4 --out runs/second
  torchrun --nproc-per-node 2 -m finetune_lab sft recipe.yaml

A killed run goes on when the same command is given again. The settings in a YAML file have the names of the flags
(`batch_size: 8`); a flag wins over the file. Every run keeps its whole recipe as recipe.yaml."""


def register(subparsers) -> None:
    """Add the command `sft` to the command line."""
    from finetune_lab.lab.finetune.recipe import SftRecipe

    line = "fine-tune a model on your own data, and get a report"
    parser = subparsers.add_parser(
        "sft", help=line, description=line, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file with settings")
    add_settings(parser, SftRecipe)
    add_run_flags(parser)
    parser.set_defaults(func=sft)


def add_settings(parser: argparse.ArgumentParser, kind: type) -> None:
    """One flag a setting of the recipe. Values stay text: the recipe reads and checks them."""
    group = parser.add_argument_group("settings")
    for each in dataclasses.fields(kind):
        flag, rule = "--" + each.name.replace("_", "-"), each.metadata
        text = rule["help"].replace("%", "%%")
        if each.default not in (None, False) and "default" not in text:
            default = ",".join(each.default) if isinstance(each.default, tuple) else each.default
            text += f" (default: {default})"
        if rule["kind"] == "switch":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            shown = "{" + ",".join(rule["choices"]) + "}" if "choices" in rule else rule["kind"].upper()
            group.add_argument(flag, metavar=shown, help=text)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """--check, --fresh, --json: the same for every trainer."""
    group = parser.add_argument_group("the run")
    group.add_argument("--check", action="store_true", help="check data and recipe, show the mask, train nothing")
    group.add_argument("--fresh", action="store_true", help="put an older run in the folder aside and start anew")
    group.add_argument("--json", action="store_true", help="print the report (with --check: the findings) as JSON")


def recipe_of(args, kind: type):
    """The recipe of a parsed command line."""
    from finetune_lab.lab.finetune.recipe import load

    return load(kind, args.config, {each.name: getattr(args, each.name) for each in dataclasses.fields(kind)})


def sft(args) -> int:
    """0 trained (or finished before, or nothing wrong found by --check), 1 --check found what forbids training."""
    from finetune_lab.lab.finetune import preflight
    from finetune_lab.lab.finetune.recipe import SftRecipe

    def train(recipe, found, say) -> dict:
        from finetune_lab.lab.finetune import run  # TRL takes seconds to import: --check does without

        return run.sft(recipe, fresh=args.fresh, say=say, found=found)

    return run_command(args, recipe_of(args, SftRecipe), preflight.inspect, train)


def run_command(args, recipe, inspect: Callable, train: Callable, also: dict | None = None) -> int:
    """What all training commands do: look, then train, then report. inspect(recipe) -> a preflight;
    train(recipe, preflight, say) -> the report; also: more values for the JSON of --check."""
    from finetune_lab.lab import data
    from finetune_lab.lab.finetune import preflight

    first, say = os.environ.get("RANK", "0") == "0", speaker(args)
    try:
        found = inspect(recipe)
    except data.DataError as error:
        if not args.json:
            raise
        print(json.dumps({"ok": False, "problems": [vars(problem) for problem in error.problems]}, indent=1))
        return 2
    bad = any(finding.level == "error" for finding in found.findings)
    if args.check:
        if args.json:
            print(json.dumps({"ok": not bad, **found.as_dict(), **(also or {})}, indent=1, ensure_ascii=False))
        else:
            print("\n".join(preflight.lines(found)))
        return int(bad)
    for text in preflight.lines(found):
        say(text)
    try:
        with _quiet(not first):
            report = train(recipe, found, say)
    except KeyboardInterrupt:
        say("\nthe same command goes on from the last checkpoint.")
        raise
    if args.json and first:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    return 0


def speaker(args) -> Callable[[str], None]:
    """Where lines of text go: to people, beside the JSON, or nowhere (second and later processes)."""
    if os.environ.get("RANK", "0") != "0":
        return _silent
    return lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def _silent(text: str) -> None:
    """What the second and later processes say."""


@contextlib.contextmanager
def _quiet(really: bool):
    """Keep the standard output of the other processes away."""
    with contextlib.redirect_stdout(io.StringIO()) if really else contextlib.nullcontext():
        yield
