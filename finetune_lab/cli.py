"""The command line: `finetune-lab COMMAND ...`, also `python -m finetune_lab COMMAND ...`.

This file knows only names. Each command lives in the module that owns it, and that module offers

    def register(subparsers):
        parser = subparsers.add_parser("run", help="...", epilog="example: finetune-lab run 01", ...)
        parser.add_argument(...)
        parser.set_defaults(func=command)      # command(args) -> exit code, or None for 0

One module may register several commands. Only the module of the command that was asked for is imported,
so `--help` is fast and a broken corner of the package does not break the rest.
Bad input raises `UserError`; it is printed as one sentence, and the exit code is 2.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from finetune_lab import __version__
from finetune_lab.errors import UserError

# command: (module that registers it, the line in --help)
COMMANDS = {
    "doctor": ("finetune_lab.course.doctor", "what this machine can run, and how to fix what it cannot"),
    "run": ("finetune_lab.course.runner", "execute lessons; print seconds and failures"),
    "status": ("finetune_lab.course.runner", "your progress, lesson by lesson"),
    "reset": ("finetune_lab.course.runner", "a fresh copy of a lesson; yours is kept beside it"),
    "guide": ("finetune_lab.course.guide", "the instructor's guide, made from the lessons"),
    "slides": ("finetune_lab.course.slides", "lessons as slides, from their own executed cells"),
    "class": ("finetune_lab.course.classroom_table", "a class at a glance, from the files that learners hand in"),
    "pack": ("finetune_lab.course.pack", "a folder from which a class installs without internet"),
    "topics": ("finetune_lab.course.topics", "every topic of the course and the lesson that teaches it"),
    "sheet": ("finetune_lab.course.sheet", "the formula sheet and the glossary as one page"),
    "troubleshoot": ("finetune_lab.course.troubleshooting", "symptom or error text: cause, test, fix"),
    "models": ("finetune_lab.lab.models_cli", "list the models, fetch one"),
    "data": ("finetune_lab.lab.data_cli", "check your own data before training on it"),
    "sft": ("finetune_lab.lab.sft_cli", "fine-tune a model on your own data, and get a report"),
    "dpo": ("finetune_lab.lab.dpo_cli", "train on preferences (DPO, IPO, KTO), and get a report"),
    "merge": ("finetune_lab.lab.merge_cli", "merge models by a recipe, without training"),
    "generate": ("finetune_lab.lab.generate_cli", "ask a model: base, adapter and merged side by side"),
    "vram": ("finetune_lab.course.vram_cli", "how much GPU memory a fine-tuning run needs, line by line"),
    "drill": ("finetune_lab.course.drills.cli", "practise interview questions, or sit a mock interview"),
    "bench": ("finetune_lab.course.bench", "measure the course's claims on this machine"),
    "new-lesson": ("finetune_lab.course.new_lesson", "start a lesson from a template that runs (authors)"),
    "build": ("finetune_lab.course.build", "make the notebooks from the lesson sources (authors)"),
    "book": ("finetune_lab.course.book", "the lessons as web pages, for reading without Jupyter"),
    "lint": ("finetune_lab.course.lint", "check lessons against their budgets (authors)"),
}

EPILOG = """examples:
  finetune-lab doctor
  finetune-lab run 00 01
  finetune-lab COMMAND --help"""


class Help(argparse.RawDescriptionHelpFormatter):
    """One line a command: argparse (3.11) forgets their indentation and wraps the longest name."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        self._action_max_length = max(self._action_max_length, *(len(name) + 4 for name in COMMANDS))


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence instead of the usage block. Subparsers inherit it."""

    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser for one run: the module of `command` is imported, every other command is only a line of help."""
    parser = Parser(
        prog="finetune-lab",
        description="Learn to fine-tune language models, in notebooks that check themselves.",
        epilog=EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"finetune-lab {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    if command in COMMANDS:
        importlib.import_module(COMMANDS[command][0]).register(subparsers)
    else:
        for name, (_, line) in COMMANDS.items():
            subparsers.add_parser(name, help=line)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the command found something wrong, 2 bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        if command is not None and command == argv[0] and command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"there is no command {command!r}{meant} (see `finetune-lab --help`)")
        parser = build_parser(command)
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            help_of = f"finetune-lab {command}" if command in COMMANDS else "finetune-lab"
            raise UserError(f"unrecognized arguments: {' '.join(unknown)} (see `{help_of} --help`)")
        if not hasattr(args, "func"):
            parser.print_help()
            return 2 if argv else 0
        return args.func(args) or 0
    except UserError as error:
        print(f"finetune-lab: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        # A package of ours that is missing is a bug and must be seen; somebody else's is an incomplete install.
        if (error.name or "finetune_lab").split(".")[0] == "finetune_lab":
            raise
        print(
            f"finetune-lab: the package {error.name!r} is not installed. "
            "Run `make install` (or `python tasks.py install`) in the repository, then `finetune-lab doctor`.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nfinetune-lab: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `finetune-lab topics | head`: the reader has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
