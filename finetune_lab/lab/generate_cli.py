"""finetune-lab generate: ask a model; the base, the start, the adapter and the merged model side by side."""

import argparse
import json
import sys
from pathlib import Path

EXAMPLES = """examples:
  finetune-lab generate "2 + 3"
  finetune-lab generate --adapter runs/sft-extract-tiny-lora "The lamp of order 4417 flickers."
  finetune-lab generate --adapter runs/x --show base,adapter,merged --prompts tickets.jsonl --json
  finetune-lab generate --adapter runs/x --chat"""

STARTS = ("adapter_config.json", "adapter/adapter_config.json")  # a start may have been deleted since


def register(subparsers) -> None:
    """Add the command `generate` to the command line."""
    line = "ask a model: base, adapter and merged side by side"
    parser = subparsers.add_parser(
        "generate", help=line, description=line, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="one question")
    parser.add_argument("--prompts", metavar="FILE", help="many: JSONL (prompt or messages), or text, one a line")
    parser.add_argument("--chat", action="store_true", help="talk to it; an empty line ends")
    parser.add_argument(
        "--model", metavar="M", help="a model, or the folder of a full run (default: the adapter's base, else tiny)"
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="an adapter, or the folder of a run")
    parser.add_argument(
        "--show",
        metavar="LIST",
        help="of base, start, adapter, merged (default: base and adapter; after `dpo --adapter`, start and adapter)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--json", action="store_true", help="prompts and answers as JSON")
    parser.set_defaults(func=generate)


def generate(args) -> int:
    """Answer one prompt, a file of prompts, or a conversation."""
    from finetune_lab.errors import UserError

    if sum(map(bool, (args.prompt, args.prompts, args.chat))) != 1:
        raise UserError("give one of these: a PROMPT, --prompts FILE or --chat.")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}: give at least 1.")
    if args.chat and args.json:
        raise UserError("--chat is for people: use --json with a PROMPT or --prompts.")
    which = _which(args.show, args.adapter, args.chat)
    chats = [] if args.chat else read_prompts(args.prompts) if args.prompts else [_user(args.prompt)]

    from finetune_lab.lab.finetune import talk
    from finetune_lab.lab.finetune.build import DTYPES

    voices = talk.load_voices(args.model, args.adapter, which, DTYPES[args.precision])
    if args.chat:
        return _chat(voices, args.max_new_tokens)
    if args.model and not args.adapter:  # a model of its own, perhaps a merged one: nobody's base
        voices = {"model": voices["base"]}
    said = {name: voice(chats, max_new_tokens=args.max_new_tokens) for name, voice in voices.items()}
    rows = [{"prompt": c, **{name: said[name][i] for name in said}} for i, c in enumerate(chats)]
    if args.json:
        print(json.dumps({"model": args.model, "adapter": args.adapter, "answers": rows}, indent=1, ensure_ascii=False))
        return 0
    for row in rows:
        print(f"prompt:  {row['prompt'][-1]['content']}")
        for name in said:
            print(f"{name + ':':9}{row[name]}")
        print()
    return 0


def _which(show: str | None, adapter: str | None, chat: bool) -> list[str]:
    from finetune_lab.errors import UserError
    from finetune_lab.lab.finetune import runs

    names = ("base", "start", "adapter", "merged")
    if show is None and not adapter:
        return ["base"]
    if show is None:
        start = None if chat else runs.start_of(adapter)
        there = start and any((Path(start).expanduser() / part).is_file() for part in STARTS)
        return ["adapter"] if chat else ["start" if there else "base", "adapter"]
    given = [word.strip() for word in show.split(",")]
    if not set(given) <= set(names):
        raise UserError(f"--show is {show!r}: name one or more of {', '.join(names)}, with commas between.")
    if chat and len(given) > 1:
        raise UserError("--chat talks to one model: give one name to --show.")
    return list(dict.fromkeys(given))


def read_prompts(path: str) -> list[list[dict]]:
    """Conversations to answer: from JSONL (`prompt`, a text or turns, or `messages`, the last answer left away), or
    from a text file, one prompt a line. Raises UserError with every bad line."""
    from finetune_lab.errors import UserError
    from finetune_lab.lab.jsonl import BadLine, read_jsonl

    file = Path(path).expanduser()
    try:
        if file.suffix not in (".jsonl", ".json"):
            chats = [_user(line.strip()) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            chats, bad = [], []
            for number, value in read_jsonl(file):
                try:
                    chats.append(_asked(value))
                except BadLine as error:
                    bad.append(f"  {path}:{number}: {error.wrong}; expected {error.expected}")
            if bad:
                raise UserError("\n".join([f"{len(bad)} bad line(s); nothing was asked.", *bad[:20]]))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}. Give a JSONL or text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text.") from error
    if not chats:
        raise UserError(f"{path} holds no prompt.")
    return chats


def _asked(value) -> list[dict]:
    """The turns to answer in one line of JSONL."""
    from finetune_lab.lab.data import conversational
    from finetune_lab.lab.jsonl import BadLine

    if isinstance(value, BadLine):
        raise value
    if "messages" in value:
        turns = value["messages"]
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            turns = turns[:-1]
    elif "prompt" in value:
        turns = value["prompt"]
    else:
        raise BadLine("there is no prompt", "'prompt' (a text or turns) or 'messages'")
    row = {"prompt": turns, "completion": "x"}  # the same checks as for training data
    return conversational(row, "prompt-completion")["prompt"]


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _chat(voices: dict, longest: int) -> int:
    """One turn after the other, until an empty line or the end of the input."""
    (voice,) = voices.values()
    turns: list[dict] = []
    while True:
        try:
            text = input("you: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if not text:
            break
        turns += _user(text)
        (said,) = voice([turns], max_new_tokens=longest)
        print(f"model: {said}")
        turns.append({"role": "assistant", "content": said or " "})
    return 0
