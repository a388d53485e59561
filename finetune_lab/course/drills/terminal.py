"""A conversation (dialogue.py) led in a terminal, or from a pipe: print what is told, read what is asked.

The end of the input, Ctrl-C and `q` stop the session (`Stop`), `s` leaves a question out (None): either way nothing
of that question is stored. A code drill is a file in the work folder: what stood there before is kept beside it.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from finetune_lab.course.drills import dialogue, render
from finetune_lab.course.drills.dialogue import Ask, Outcome, Tell
from finetune_lab.course.drills.schema import Item
from finetune_lab.course.lessons import keep_mine, write_atomic
from finetune_lab.errors import UserError

HELP = "Type ? to give up, s to skip (nothing is stored), q to stop."
_MARKS = {"right": "[ok] ", "wrong": "[x] "}


class Stop(Exception):
    """The learner wants no more questions, or there is no more input."""


class Skip(Exception):
    """The learner leaves this question out."""


class Terminal:
    """Where to print (`out`) and where code drills are written (`work`)."""

    def __init__(self, out: TextIO, work: Path):
        self.out, self.work = out, work
        self._begun: Path | None = None  # the file of the code drill that is being asked
        for stream in (sys.stdin, out):
            if hasattr(stream, "reconfigure"):  # a character that the terminal cannot show is no reason to die
                stream.reconfigure(errors="replace")

    def say(self, text: str = "") -> None:
        print(text, file=self.out, flush=True)

    def lead(self, conversation: dialogue.Conversation, item: Item) -> Outcome | None:
        """The outcome of one conversation, None when it was skipped.

        Raises:
            Stop: no more questions.
        """
        step, self._begun = next(conversation), None
        try:
            while True:
                if isinstance(step, Tell):
                    self.say(_MARKS.get(step.role, "") + render.to_plain(step.text) + "\n")
                    step = next(conversation)
                else:
                    step = conversation.send(self._ask(step, item))
        except StopIteration as end:
            return end.value
        except Skip:
            return None
        finally:
            conversation.close()

    def _ask(self, ask: Ask, item: Item) -> str:
        if ask.form == "code":
            return self._code(ask, item)
        if ask.form == "lines":
            self.say("(a line that ends with \\ goes on; Enter alone deletes the line)")
        options = " / ".join(f"{word} ({n})" for n, word in enumerate(ask.options, 1))
        said = self._read(f"{ask.prompt}{': ' + options if options else ''} > ")
        while ask.form == "lines" and said.endswith("\\"):
            said = said[:-1] + "\n" + self._read("... > ")
        return said

    def _read(self, prompt: str) -> str:
        try:
            if self.out is sys.stdout:
                line = input(prompt)  # so that line editing knows where the prompt ends
            else:
                print(prompt, end="", file=self.out, flush=True)
                line = input()
        except (EOFError, KeyboardInterrupt):
            self.say()
            raise Stop from None
        if not sys.stdin.isatty():
            self.say(line)  # a transcript of a piped session can be read
        if line.strip().lower() in ("q", "quit"):
            raise Stop
        if line.strip().lower() in ("s", "skip"):
            raise Skip
        return line

    def _code(self, ask: Ask, item: Item) -> str:
        """The file's text once the learner says that it is ready."""
        path = self.work / f"{item.id}.py"
        if self._begun != path:
            self._begin(path, ask)
        while True:
            said = self._read(f"{ask.prompt}: Enter checks {path.name}, e opens your editor > ").strip()
            if said == dialogue.GIVE_UP:
                return said
            if said.lower() == "e":
                self._edit(path)
                continue
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                self.say(f"{path} is not UTF-8 text: save it as UTF-8 and press Enter.")
            except FileNotFoundError:
                self._begin(path, ask)
            except OSError as error:
                self.say(f"cannot read {path} ({error.strerror}): mend that and press Enter.")

    def _begin(self, path: Path, ask: Ask) -> None:
        """A fresh file to write in. Raises UserError when the work folder cannot be used."""
        fresh = f"# Write your code here, save, then press Enter in the terminal.\n\n{ask.initial.rstrip()}\n"
        try:
            if path.exists() and path.read_bytes() != fresh.encode():
                self.say(f"your earlier {path.name} is kept as {keep_mine(path).name}")
            write_atomic(path, fresh)
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error.strerror or error}); name a folder that you may write with --work DIR. "
                "What you answered so far is stored."
            ) from None
        self._begun = path
        self.say(f"write your code in {path}")

    def _edit(self, path: Path) -> None:
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
        if not editor:
            self.say(f"no editor is set (VISUAL or EDITOR): open {path} yourself.")
            return
        try:
            subprocess.call([*shlex.split(editor), str(path)])
        except (OSError, ValueError) as error:
            self.say(f"cannot start {editor!r} ({error}): open {path} yourself.")
