"""finetune-lab data check FILE: is my JSONL fit for training, and where is it not?"""

import argparse
import json
import statistics

EXAMPLES = """examples:
  finetune-lab data check tickets.jsonl
  finetune-lab data check tickets.jsonl --model smollm2-135m --json"""


def register(subparsers) -> None:
    """Add the command `data` to the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    line = "check your own data before training on it"
    parser = subparsers.add_parser("data", help=line, description=line, epilog=EXAMPLES, formatter_class=raw)
    parser.set_defaults(func=lambda args: parser.print_help() or 2)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    check = actions.add_parser("check", help="name every bad line", epilog=EXAMPLES, formatter_class=raw)
    check.add_argument(
        "file", metavar="FILE", help="JSONL: messages / prompt, completion (, label) / prompt, chosen, rejected"
    )
    check.add_argument(
        "--kind", choices=("messages", "prompt-completion", "preference", "unpaired"), help="the format you expect"
    )
    check.add_argument("--model", metavar="M", help="whose tokenizer counts (default: $FINETUNE_LAB_MODEL or tiny)")
    check.add_argument(
        "--special-tokens", choices=("error", "escape"), default="error", help="what to do with control tokens in text"
    )
    check.add_argument("--json", action="store_true", help="rows, tokens and problems as JSON")
    check.set_defaults(func=check_file)


def check_file(args) -> int:
    """Print what is in the file, or what is wrong with it. 0 fit for training, 1 bad lines."""
    from finetune_lab.lab import data, models

    name = models.chosen(args.model)
    tokenizer, context = models.load_tokenizer(name), models.context_length(name) or 10**9
    try:
        rows = data.load_jsonl(args.file, args.kind, tokenizer=tokenizer, special_tokens=args.special_tokens)
    except data.DataError as error:
        if args.json:
            problems = [vars(problem) for problem in error.problems]
            print(json.dumps({"file": args.file, "ok": False, "problems": problems}, indent=2))
        else:
            print(error)
        return 1
    lengths = [length for row in rows for length in data.token_counts(row, tokenizer)]
    report = {
        "file": args.file, "ok": True, "kind": data.format_of(rows[0]), "rows": len(rows), "model": name,
        "tokens_median": statistics.median(lengths), "tokens_max": max(lengths), "context": context,
        "too_long": sum(length > context for length in lengths), "problems": [],
    }  # fmt: skip
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(
        f"{args.file}: {report['rows']} row{'s' * (len(rows) > 1)} of {report['kind']} data, every line is well formed"
    )
    print(
        f"  tokens of {name}: median {report['tokens_median']:.0f}, longest {report['tokens_max']} (context {context})"
    )
    if report["too_long"]:
        print(f"  {report['too_long']} texts are longer than the context and would be cut off: split them")
    return 0
