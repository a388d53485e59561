"""finetune-lab models list | fetch: what there is, what is on this machine, and getting the rest."""

import argparse
import json
import time

EXAMPLES = """examples:
  finetune-lab models list
  finetune-lab models list --json
  finetune-lab models fetch smollm2-135m"""


def register(subparsers) -> None:
    """Add the command `models` to the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    line = "list the models, fetch one"
    parser = subparsers.add_parser("models", help=line, description=line, epilog=EXAMPLES, formatter_class=raw)
    parser.set_defaults(func=lambda args: parser.print_help() or 2)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    listing = actions.add_parser("list", help="every model with a name", epilog=EXAMPLES, formatter_class=raw)
    listing.add_argument("--json", action="store_true", help="the same as JSON; sizes in bytes")
    listing.set_defaults(func=list_models)

    fetching = actions.add_parser("fetch", help="bring a model to this machine", epilog=EXAMPLES, formatter_class=raw)
    fetching.add_argument("name", metavar="NAME", help="a name from the list, a hub id (owner/name) or a folder")
    fetching.add_argument("--json", action="store_true", help="print the folder and its size in bytes as JSON")
    fetching.set_defaults(func=fetch_model)


def list_models(args) -> int:
    """Print one block a model."""
    from finetune_lab.lab import models

    rows = [models.describe(name) for name in models.KNOWN]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        where = f"cached, {_mb(row['disk_bytes'])} on disk" if row["cached"] else "not on this machine"
        if not row["cached"] and row["download_bytes"]:
            where += f" ({_mb(row['download_bytes'])} to download)"
        print(f"{row['name']}: {where}")
        print(f"  parameters {_count(row['parameters'])}, tokenizer {_count(row['vocabulary'])} tokens")
        print(f"  licence {row['licence']}; from: {row['source']}")
        print(f"  needs {row['needs']}")
        if row["folder"]:
            print(f"  in {row['folder']}")
    print("Any hub id (owner/name) or folder with safetensors and a tokenizer works as well.")
    return 0


def fetch_model(args) -> int:
    """Fetch, load nothing, say where it is."""
    from finetune_lab.lab import models
    from finetune_lab.lab.bars import folder_bytes

    start = time.monotonic()
    folder = models.locate(args.name)
    models.check_folder(folder, args.name)
    size = folder_bytes(folder)
    if args.json:
        print(json.dumps({"name": args.name, "folder": str(folder), "disk_bytes": size}))
    else:
        print(f"{args.name} is ready: {_mb(size)} in {folder} ({time.monotonic() - start:.0f} s)")
    return 0


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
