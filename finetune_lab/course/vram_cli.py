"""`finetune-lab vram MODEL`: the bytes of a fine-tuning run, line by line, and whether they fit.

Asks no network: a model is a preset, a folder or file with a config, or a hub id whose config lies in the local cache.
The figures come from `methods.memory.estimate`; this module only reads words and prints.
"""

import argparse
import difflib
import json
from dataclasses import replace
from pathlib import Path

from finetune_lab.course import vram_report as report
from finetune_lab.course.vram_models import resolve
from finetune_lab.errors import UserError
from finetune_lab.methods.memory import Architecture, Ledger, Recipe, estimate, fit, from_config
from finetune_lab.methods.memory.presets import GPUS, PRESETS, find_gpu
from finetune_lab.methods.memory.recipe import CHOICES

EXAMPLES = """examples:
  finetune-lab vram llama-3.1-8b --method qlora --seq 2048 --gpu RTX-4090
  finetune-lab vram Qwen/Qwen3-0.6B --method full --optimizer adamw-8bit --checkpointing --plot bytes.png
  finetune-lab vram llama-3.1-8b --method lora --fit 24GB
  finetune-lab vram my-model/config.json --method dora --rank 32 --json
  finetune-lab vram --list"""
# option: (Recipe's field, help); the words allowed are Recipe's own
WORDS = {
    "--method": ("method", "what trains"),
    "--objective": ("objective", "the loss; dpo and reward count pairs, ppo and grpo generate"),
    "--optimizer": ("optimizer", "who keeps states"),
    "--dtype": ("dtype", "stored weights of the base"),
    "--adapter-dtype": ("adapter_dtype", "stored adapters (peft: fp32 on a 16-bit base)"),
    "--attn": ("attention", "attention kernel"),
    "--logits": ("logits", "which logits exist, and for how long"),
    "--reference": ("reference", "DPO: where the reference's figures come from"),
    "--update": ("update", "how the optimizer runs over the tensors"),
    "--sharding": ("sharding", "what is divided over the ranks"),
    "--offload": ("offload", "what lives in the host's memory"),
}
NUMBERS = {
    "--rank": ("rank", int, "rank of the adapter"),
    "--seq": ("seq", int, "tokens of one sequence"),
    "--batch": ("batch", int, "sequences (or pairs) in one step of one card"),
    "--dropout": ("dropout", float, "dropout of the adapter"),
    "--labelled": ("labelled", float, "share of positions that count in the loss"),
    "--ranks": ("ranks", int, "cards; figures are those of one of them"),
    "--generations": ("generations", int, "GRPO: answers to one prompt"),
    "--completion": ("completion", int, "PPO, GRPO: tokens written, a part of --seq"),
}
PICTURES = (".png", ".svg", ".pdf")
ADAPTER_ONLY = {
    "--rank": "rank",
    "--targets": "targets",
    "--dropout": "dropout",
    "--adapter-dtype": "adapter_dtype",
}


def register(subparsers) -> None:
    """Add the command `vram` to the command line."""
    line = "how much GPU memory a fine-tuning run needs, line by line"
    parser = subparsers.add_parser(
        "vram", help=line, description=f"{line[0].upper()}{line[1:]}. {report.UNIT_NOTE}", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parse = parser.parse_known_args

    def parse_all(*words):
        """What argparse would leave over for the main parser is refused here, where the right --help is named."""
        namespace, left = parse(*words)
        if left:
            parser.error(f"unrecognized arguments: {' '.join(left)}")
        return namespace, left

    parser.parse_known_args = parse_all
    parser.add_argument("model", metavar="MODEL", nargs="?", help="preset, folder, config.json, or a cached hub id")
    for option, (field, text) in WORDS.items():
        allowed = ", ".join(word for word in CHOICES[field] if word)
        parser.add_argument(option, dest=field, metavar="WORD", help=f"{text}: {allowed}")
    for option, (field, kind, text) in NUMBERS.items():
        parser.add_argument(option, dest=field, type=kind, metavar="N", help=text)
    parser.add_argument("--targets", metavar="NAMES", help="all-linear, or names such as q_proj,v_proj")
    parser.add_argument("--checkpointing", action="store_true", help="recompute every layer in backward")
    parser.add_argument("--master-weights", action="store_true", help="fp32 copy of 16-bit trained weights")
    parser.add_argument(
        "--autocast", action="store_true", help="fp32 weights, 16-bit matrix products (with --dtype fp32)"
    )
    parser.add_argument("--zero", choices=("1", "2", "3"), metavar="STAGE", help="short for --sharding zeroSTAGE")
    parser.add_argument("--gpu", metavar="NAME", help="say whether it fits on this card (--list names them)")
    parser.add_argument(
        "--fit", metavar="SIZE", nargs="?", const="", help="largest batch, sequence and model for 24GB (or for --gpu), and levers"
    )  # fmt: skip
    parser.add_argument("--all-lines", action="store_true", help="print the small lines too")
    parser.add_argument("--plot", metavar="FILE", help="write a stacked bar of the peak (.png, .svg, .pdf)")
    parser.add_argument("--timeline", metavar="FILE", help="write memory through one step (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print JSON; sizes in bytes")
    parser.add_argument("--list", action="store_true", help="the presets and the cards")
    parser.set_defaults(func=command)


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The Recipe of the command line; what was not said is Recipe's default."""
    if args.method in CHOICES["objective"]:
        raise UserError(
            f"{args.method} is an objective, not a method: --objective {args.method} --method lora (or full)."
        )
    given = {field: getattr(args, field) for field, *_ in (*WORDS.values(), *NUMBERS.values())}
    given = {field: value for field, value in given.items() if value is not None}
    given |= {name: True for name in ("checkpointing", "master_weights", "autocast") if getattr(args, name)}
    if args.targets and args.targets != "all-linear":
        given["targets"] = tuple(name.strip() for name in args.targets.split(",") if name.strip())
    if args.zero:
        if given.get("sharding", f"zero{args.zero}") != f"zero{args.zero}":
            raise UserError(f"--zero {args.zero} and --sharding {args.sharding} contradict each other: give one.")
        given["sharding"] = f"zero{args.zero}"
    if given.get("objective") == "dpo" and "reference" not in given:
        given["reference"] = "separate" if given.get("method") == "full" else "adapter-off"
    try:
        recipe = Recipe(**given)
    except ValueError as error:
        raise UserError(str(error)) from None
    _refuse_without_effect(args, recipe)
    return recipe


def _refuse_without_effect(args: argparse.Namespace, recipe: Recipe) -> None:
    """A flag that was given and would change nothing is a misunderstanding: say so before a figure is believed."""
    objective = recipe.objective
    if recipe.sharding != "none" and recipe.ranks == 1:
        said = f"--zero {args.zero}" if args.zero else f"--sharding {recipe.sharding}"
        verb = "copies" if recipe.sharding == "ddp" else "shards"
        raise UserError(f"{said} {verb} over ranks: give --ranks N of at least 2.")
    if recipe.method == "full":
        for option, field in ADAPTER_ONLY.items():
            if getattr(args, field) is not None:
                raise UserError(f"{option} describes an adapter, and --method full has none: leave {option} out.")
    if args.labelled is not None and objective == "reward":
        raise UserError("--labelled has no effect with --objective reward, which has no logits of words: leave it out.")
    if args.labelled is not None and recipe.logits == "full":
        raise UserError("--labelled has no effect while logits exist at every position: give --logits labelled too.")
    if args.generations is not None and objective != "grpo":
        raise UserError(f"--generations belongs to --objective grpo, and this is {objective}: leave it out.")
    if args.completion is not None and objective not in ("ppo", "grpo"):
        raise UserError(f"--completion belongs to --objective ppo and grpo, and this is {objective}: leave it out.")


def notes(architecture: Architecture, recipe: Recipe) -> list[str]:
    """What a reader of these figures should know, in sentences."""
    if architecture.max_positions and recipe.seq > architecture.max_positions:
        limit = f"{architecture.max_positions:,} positions of {architecture.name}"
        return [f"{recipe.seq:,} tokens are more than the {limit}: the model was not made for this length."]
    return []


def command(args: argparse.Namespace) -> int:
    """`finetune-lab vram`."""
    if args.list:
        return show_list(args.json)
    if not args.model:
        raise UserError("which model? Give a preset, a folder, a config.json or a hub id (`finetune-lab vram --list`).")
    _check_pictures(args)
    architecture, recipe = resolve(args.model), recipe_from(args)
    card = _card(args.gpu)
    budget = _budget(args.fit, card)
    try:
        ledger = estimate(architecture, recipe)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.master_weights and not any(line.category == "master weights" for line in (*ledger.lines, *ledger.host)):
        raise UserError(
            "--master-weights copies trained 16-bit weights, and all that trains here is fp32 already: leave it out."
        )
    limit = card or budget
    asked = None if args.fit is None else solve(architecture, recipe, budget[1])
    if args.json:
        result = report.as_json(architecture, recipe, ledger) | {"notes": notes(architecture, recipe)}
        if limit:
            result["budget"] = {"name": limit[0], "bytes": limit[1], "fits": ledger.total_on_device <= limit[1]}
        if asked:
            result["fit"] = asked | {"levers": [vars(saving) for saving in asked["levers"]]}
        print(json.dumps(result, indent=2))
    else:
        show(architecture, recipe, ledger, limit, args.all_lines)
        if asked:
            show_fit(architecture, recipe, budget, asked)
        elif limit and ledger.total_on_device > limit[1]:
            print("\n" + report.levers([one for one in fit.savings(architecture, recipe) if one.saves > 0]))
        print(f"\n{report.UNIT_NOTE}")
    _draw(args, architecture, recipe, ledger, limit)
    return 0


def _card(name: str | None) -> tuple[str, int] | None:
    if name is None:
        return None
    card = find_gpu(name)
    if card is None:
        near = ", ".join(f"{one}?" for one in _similar_cards(name))
        raise UserError(
            f"there is no card {name!r} in the list{f': {near}' if near else '.'} "
            "`finetune-lab vram --list` names them all, and --fit 24GB takes any size."
        )
    return card, GPUS[card]


def _similar_cards(name: str, most: int = 3) -> list[str]:
    """Cards whose name contains what was said, else the one spelled most like it."""
    cards = {"".join(filter(str.isalnum, card)).lower(): card for card in GPUS}
    said = "".join(filter(str.isalnum, name)).lower()
    inside = [card for plain, card in cards.items() if said and said in plain]
    return inside[:most] or [cards[plain] for plain in difflib.get_close_matches(said, cards, n=1)]


def _check_pictures(args: argparse.Namespace) -> None:
    """Refuse a picture that could not be written, before anything is computed."""
    for option, path in (("--plot", args.plot), ("--timeline", args.timeline)):
        if path is None:
            continue
        if Path(path).suffix.lower() not in PICTURES:
            raise UserError(f"{option} {path!r} is no picture: give a file that ends in {', '.join(PICTURES)}.")
        if not Path(path).parent.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {Path(path).parent}.")


def _write_picture(figure, path: Path) -> None:
    from finetune_lab.course import plots

    if path.suffix.lower() == ".png":
        path.write_bytes(plots.png(figure))
    else:
        date = {".svg": "Date", ".pdf": "CreationDate"}[path.suffix.lower()]
        figure.savefig(path, format=path.suffix.lower()[1:], metadata={date: None})  # no date in the file


def _budget(size: str | None, card: tuple[str, int] | None) -> tuple[str, int] | None:
    if size:
        return size, report.parse_size(size)
    if size == "" and card is None:
        raise UserError("--fit needs a size, such as --fit 24GB, or a card: --gpu RTX-4090 --fit.")
    return card if size == "" else None


def solve(architecture: Architecture, recipe: Recipe, budget: int) -> dict:
    """The most that fits into `budget` bytes, one dial at a time, and what each lever saves."""
    return {
        "batch": fit.largest_batch(architecture, recipe, budget),
        "seq": fit.largest_seq(architecture, recipe, budget),
        "models": [{"name": n, "parameters": p, "bytes": b} for n, p, b in fit.models_that_fit(recipe, budget)],
        "levers": fit.savings(architecture, recipe),
    }


def show(
    architecture: Architecture, recipe: Recipe, ledger: Ledger, limit: tuple[str, int] | None, every: bool
) -> None:
    print(report.headline(architecture, recipe))
    for note in notes(architecture, recipe):
        print(f"Note: {note}")
    print(f"\n{report.table(ledger, every)}\n\n{report.moments(ledger)}\n")
    print(report.summary(ledger))
    if limit:
        print(report.verdict(ledger, *limit))


def show_fit(architecture: Architecture, recipe: Recipe, budget: tuple[str, int], asked: dict) -> None:
    """What fits into the budget, in sentences, then the levers."""
    print(f"\nWhat fits into {budget[0]} ({report.both(budget[1])}), one dial at a time:")
    batch = (
        f"{asked['batch']:,} x {recipe.seq} tokens"
        if asked["batch"]
        else f"not even one sequence of {recipe.seq} tokens"
    )
    batch += " or more" if asked["batch"] == fit.BATCH_LIMIT else ""
    seq = f"{asked['seq']:,} tokens at batch {recipe.batch}" if asked["seq"] else f"not even {fit.SEQ_STEP} tokens"
    seq += " (where the model's positions end)" if asked["seq"] and asked["seq"] == architecture.max_positions else ""
    print(f"  largest batch     {batch}\n  longest sequence  {seq}")
    first = asked["models"][0] if asked["models"] else None
    model = f"{first['name']}, {report.both(first['bytes'])}" if first else "none of the presets"
    print(f"  largest preset    {model}")
    if not asked["batch"] and not asked["seq"]:
        least = estimate(architecture, replace(recipe, batch=1, seq=1)).total_on_device
        print(f"  {architecture.name} needs {report.gb(least)} in this recipe before the first token of text")
    print("\n" + report.levers(asked["levers"]))


def _draw(args, architecture: Architecture, recipe: Recipe, ledger: Ledger, limit: tuple[str, int] | None) -> None:
    """Write the pictures that were asked for."""
    if not (args.plot or args.timeline):
        return
    from finetune_lab.course import vram_plot

    what = f"{architecture.name}, {recipe.method}"
    label = f"batch {recipe.batch} x {recipe.seq} tokens"
    bar = f"{what}: {ledger.total_on_device / 1e9:.3g} GB on the device"
    for path, draw in (
        (args.plot, lambda: vram_plot.stack({label: ledger}, bar, limit)),
        (args.timeline, lambda: vram_plot.timeline(ledger, f"{what}: peak at the {ledger.peak_moment}", limit)),
    ):
        if path:
            try:
                _write_picture(draw(), Path(path))
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}. Give another file.") from None
            if not args.json:
                print(f"written: {path}")


def show_list(as_json: bool) -> int:
    """`--list`: every preset with its parameters, every card with its bytes."""
    models = {name: from_config(config, name).parameters() for name, config in PRESETS.items()}
    if as_json:
        print(json.dumps({"models": models, "gpus": GPUS}, indent=2))
        return 0
    print("models (parameters); also tiny, a folder, a config.json, a cached hub id")
    print("\n".join(f"  {name:<20}{count:>16,}" for name, count in models.items()))
    print("cards (memory as torch reports it)")
    print("\n".join(f"  {name:<20}{report.both(size):>24}" for name, size in GPUS.items()))
    return 0
