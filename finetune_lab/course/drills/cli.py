"""`finetune-lab drill`: practise interview questions in the terminal, sit a mock interview, see how it went.

This module only leads: session.py chooses and counts, dialogue.py asks, state.py remembers, export.py writes decks.
With --json the figures go to stdout and everything else to stderr. Every answer is stored before the next question.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from finetune_lab.course import progress
from finetune_lab.course.drills import schema
from finetune_lab.errors import UserError

MINUTES = 20.0
EXAMPLES = """examples:
  finetune-lab drill --topic lora --level expert --minutes 20
  finetune-lab drill --mock 45
  finetune-lab drill --history --plot history.png
  finetune-lab drill list --lesson 01
  finetune-lab drill export --anki deck.apkg"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "drill",
        help="practise interview questions, or sit a mock interview",
        description="Interview questions that check your answer and come back before you forget them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_filters(parser, None)
    parser.add_argument("--minutes", type=_minutes, metavar="M", help=f"how long to practise ({MINUTES:g})")
    parser.add_argument("--mock", type=_minutes, metavar="M", help="a mock interview of M minutes, with a score card")
    parser.add_argument("--history", action="store_true", help="what you answered so far, and what you still know")
    parser.add_argument("--plot", metavar="FILE.png", help="with --history: also draw it")
    parser.add_argument("--seed", type=int, metavar="S", help="the same questions and numbers again")
    parser.add_argument("--work", metavar="DIR", help="where code drills are written (default: your data folder)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON; questions go to stderr")
    parser.set_defaults(func=_drill)
    actions = parser.add_subparsers(title="more", metavar="list | export")
    listing = actions.add_parser(
        "list", help="the questions of the bank, counted", epilog="example: finetune-lab drill list --kind number"
    )
    listing.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    listing.set_defaults(func=_list)
    export = actions.add_parser(
        "export",
        help="an Anki deck, or a text for printing",
        description="Write the questions as an Anki deck (import it again later: cards are updated, not doubled) "
        "or as markdown.",
        epilog="example: finetune-lab drill export --markdown drills.md --answers --lesson 03",
    )
    export.add_argument("--anki", metavar="FILE.apkg", help="write an Anki deck")
    export.add_argument("--markdown", metavar="FILE.md", help="write markdown")
    export.add_argument("--answers", action="store_true", help="markdown with the answers (for instructors)")
    export.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="draw other numbers (default 0)")
    export.set_defaults(func=_export)
    for sub in (listing, export):
        _add_filters(sub, argparse.SUPPRESS)  # so that a filter before the word `list` or `export` counts too


def _add_filters(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument("--topic", metavar="WORD", default=default, help="part of a topic's name, or a tag")
    parser.add_argument("--level", metavar="LEVEL", default=default, help=" | ".join(schema.LEVELS))
    parser.add_argument("--kind", metavar="KIND", default=default, help=" | ".join(schema.KINDS))
    parser.add_argument("--lesson", metavar="NN", default=default, help="only what this lesson teaches")


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r}: expected minutes, 1 to 600")
    return value


def _selected(args: argparse.Namespace) -> list[schema.Item]:
    from finetune_lab.course.drills import session

    items = schema.load()
    if not items:
        raise UserError("the question bank is empty; reinstall the package with `make install`.")
    return session.select(items, topic=args.topic, level=args.level, kind=args.kind, lesson=args.lesson)


def _drill(args: argparse.Namespace) -> int:
    if args.plot and not args.history:
        raise UserError("--plot needs --history: finetune-lab drill --history --plot history.png")
    if args.history and args.mock is not None or args.mock is not None and args.minutes is not None:
        raise UserError("choose one of --history, --mock M and --minutes M.")
    if args.history:
        return _history(args)
    from finetune_lab.course.drills.terminal import Terminal

    work = Path(args.work) if args.work else progress.home() / "drills"
    if work.exists() and not work.is_dir():
        raise UserError(f"--work {args.work!r} is not a folder; name one (it is created when needed).")
    terminal = Terminal(sys.stderr if args.json else sys.stdout, work)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    lead = _mock if args.mock is not None else _practise
    figures = lead(args, terminal, random.Random(seed))
    figures["seed"] = seed
    if args.json:
        print(json.dumps(figures, indent=1, ensure_ascii=False))
    return 0


def _practise(args: argparse.Namespace, terminal, rng: random.Random) -> dict:
    from finetune_lab.course.drills import report, session, state

    minutes = args.minutes or MINUTES
    cards = state.cards(state.reviews())
    items, about = session.queue(_selected(args), cards, datetime.now(UTC), rng)
    planned = session.fitting(items, minutes)
    terminal.say(f"{about}. {len(planned)} of them fit into {minutes:g} minutes.")
    answers = _ask_all(planned, minutes, terminal, rng, again=True)
    terminal.say(report.practice_text(answers, state.cards(state.reviews())))
    return report.score_card(answers, planned, minutes)


def _mock(args: argparse.Namespace, terminal, rng: random.Random) -> dict:
    from finetune_lab.course.drills import report, session

    planned = session.interview(_selected(args), args.mock, rng)
    total = sum(item.minutes for item in planned)
    terminal.say(f"Mock interview: {len(planned)} questions, {total} of {args.mock:g} minutes. One try each.")
    began = datetime.now(UTC).isoformat(timespec="milliseconds")
    answers = _ask_all(planned, args.mock, terminal, rng, mock=began)
    figures = report.score_card(answers, planned, args.mock)
    terminal.say(report.score_text(figures))
    return figures


def _ask_all(
    planned: Sequence[schema.Item],
    minutes: float,
    terminal,
    rng: random.Random,
    *,
    again: bool = False,
    mock: str | None = None,
) -> list:
    """Ask one item after the other until the minutes are over, and store each answer at once.

    again: an item rated `again` comes once more at the end, while there is time.
    """
    from finetune_lab.course.drills import dialogue, render, report, session
    from finetune_lab.course.drills import terminal as terminals

    terminal.say(terminals.HELP + "\n")
    waiting, answers, begun = list(planned), [], time.monotonic()
    repeated = set()
    for number, item in enumerate(waiting, 1):
        left = minutes - (time.monotonic() - begun) / 60
        if left <= 0:
            terminal.say(f"Time is up: {len(waiting) - number + 1} not reached.\n")
            break
        terminal.say(f"-- {number} of {len(waiting)}: {report.label(item)}; {left:.0f} minutes left --\n")
        start = time.monotonic()
        try:
            outcome = terminal.lead(dialogue.converse(item, rng, tries=1 if mock else 2), item)
        except terminals.Stop:
            terminal.say("Stopped. Everything you answered is stored.\n")
            break
        if outcome is None:
            continue
        answers.append(session.keep(item, outcome, time.monotonic() - start, mock))
        terminal.say(render.to_plain(report.sources_text(item)) + "\n")
        if again and outcome.rating == 1 and item.id not in repeated:
            repeated.add(item.id)
            waiting.append(item)
    return answers


def _history(args: argparse.Namespace) -> int:
    from finetune_lab.course.drills import report, state

    log, items = state.reviews(), _selected(args)
    if args.topic or args.level or args.kind or args.lesson:
        wanted = {item.id for item in items}
        log = [review for review in log if review.item in wanted]
    figures = report.history(log, items, datetime.now(UTC))
    if args.plot:
        from finetune_lab.course import plots
        from finetune_lab.course.drills import export

        if not log:
            raise UserError("there is no history to plot yet: answer a few questions with `finetune-lab drill`.")
        path = export.target(args.plot, ".png")
        figure, alt = report.plot(figures)
        export.write_bytes(path, plots.png(figure))
        figures["plot"] = {"file": str(path), "alt": alt}
    print(json.dumps(figures, indent=1) if args.json else report.history_text(figures))
    return 0


def _list(args: argparse.Namespace) -> int:
    items = _selected(args)
    counts = schema.counts(items)
    if args.json:
        rows = [
            {key: getattr(item, key) for key in ("id", "kind", "level", "minutes", "lesson", "topic")} for item in items
        ]
        print(json.dumps({"items": len(items), **counts, "list": rows}, indent=1))
        return 0
    for item in items:
        print(f"{item.lesson}  {item.kind:<6}  {item.level:<8}  {item.minutes:>2} min  {item.id}")
    print(f"{len(items)} questions")
    for key, by in counts.items():
        print(f"  by {key}: " + ", ".join(f"{value} {n}" for value, n in by.items() if n))
    return 0


def _export(args: argparse.Namespace) -> int:
    from finetune_lab.course.drills import export

    if not args.anki and not args.markdown:
        raise UserError("say what to write: --anki FILE.apkg, --markdown FILE.md, or both.")
    if args.answers and not args.markdown:
        raise UserError("--answers belongs to --markdown; an Anki deck always has them.")
    items, seed = _selected(args), args.seed or 0
    if args.anki:
        path = export.write_anki(items, args.anki, seed)
        print(f"{path}: {len(items)} notes")
    if args.markdown:
        path, kept = export.write_markdown(items, args.markdown, answers=args.answers, seed=seed)
        print(f"{path}: {len(items)} questions" + (f" (the file that was there is {kept.name})" if kept else ""))
    return 0
