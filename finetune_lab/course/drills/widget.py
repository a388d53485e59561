"""The same drills in a notebook: the conversation of dialogue.py led by ipywidgets.

    from finetune_lab.course.drills.widget import Drills
    Drills(topic="lora", minutes=20)          # as the last line of a cell; mock=45 for a mock interview

The keyboard is enough: Enter in the answer line answers, Tab reaches the buttons. Math is set by `HTMLMath`. There is no
`Output` widget (it swallows errors and has hung nbclient). An answer is stored before the next question is shown; a
question that is left out, or a page that is closed, stores nothing. On a page without a kernel the output is the first
question with its answer folded.
"""

import asyncio
import html
import random
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from ipywidgets import HTML, Button, HBox, HTMLMath, Layout, Text, Textarea, VBox

from finetune_lab.course.drills import dialogue, export, render, report, schema, session, state
from finetune_lab.course.drills.dialogue import Ask, Outcome, Tell
from finetune_lab.course.drills.schema import Item
from finetune_lab.errors import UserError

# role -> (colour of the bar at the left, word before the text): the word says the same as the colour
_FRAMES = {
    "question": ("#0072B2", ""),
    "answer": ("#009E73", "<b>Answer.</b>"),
    "right": ("#009E73", "<b>[ok]</b>"),
    "wrong": ("#D55E00", "<b>[x]</b>"),
    "note": ("#767676", ""),
}
ENTER_SECONDS = 0.2
_WAYS = ("Next question", "Give up", "Skip", "Stop")


class Drills(VBox):
    """A practice session of `minutes`, or a mock interview of `mock` minutes.

    topic, level, kind, lesson choose as in `finetune-lab drill`; the same `seed` asks the same. `items` replaces the
    bank (for tests).

    Raises:
        UserError: a filter that fits nothing, or minutes in which no question fits.
    """

    def __init__(
        self,
        *,
        topic: str | None = None,
        level: str | None = None,
        kind: str | None = None,
        lesson: str | None = None,
        minutes: float = 20,
        mock: float | None = None,
        seed: int | None = None,
        items: Sequence[Item] | None = None,
    ):
        bank = schema.load() if items is None else items
        bank = session.select(bank, topic=topic, level=level, kind=kind, lesson=lesson)
        seed = random.SystemRandom().randrange(10**6) if seed is None else seed
        self._rng = random.Random(seed)
        if mock is None:
            self._minutes, self._mock = minutes, None
            ordered, _ = session.queue(bank, state.cards(state.reviews()), datetime.now(UTC), self._rng)
            self._planned = session.fitting(ordered, minutes)
        else:
            self._minutes, self._mock = mock, datetime.now(UTC).isoformat(timespec="milliseconds")
            self._planned = session.interview(bank, mock, self._rng)
        self._at, self._answers, self._told, self._begun = -1, [], [], time.monotonic()
        self._talk: dialogue.Conversation | None = None  # of the question that is open
        self._waiting = False  # for the text that belongs to an Enter
        self._status, self._view, self._prompt = HTML(), HTMLMath(), HTML()
        # Not continuous: while one change is on its way ipywidgets holds back the next, but not a click or an Enter,
        # so that quick typing and Enter would answer "4" instead of "42".
        self._line = Text(layout=Layout(width="98%"), continuous_update=False)
        self._area = Textarea(layout=Layout(width="98%", height="16em"), continuous_update=False)
        self._box: Text | Textarea = self._line
        # Every button is there from the start and only hidden: the focus and the order of Tab stay.
        self._check = self._button("Check", lambda: self._answer(self._box.value), "primary")
        self._words = {
            word: self._button(word, lambda word=word: self._answer(word), "primary")
            for word in (*dialogue.RATINGS, "yes", "no")
        }
        acts = (self._next, lambda: self._answer(dialogue.GIVE_UP), self._next, self._stop)
        self._ways = {name: self._button(name, act) for name, act in zip(_WAYS, acts, strict=True)}
        with warnings.catch_warnings():
            # ipywidgets 8.1 wants the value observed instead; that answers as soon as the focus leaves the line, also
            # on its way to "Skip".
            warnings.simplefilter("ignore", DeprecationWarning)
            self._line.on_submit(lambda _: self._entered())
        row = HBox([self._check, *self._words.values(), *self._ways.values()], layout=Layout(flex_flow="row wrap"))
        super().__init__([self._status, self._view, self._prompt, self._line, self._area, row])
        self._still = self._first(seed)
        self._next()

    def _button(self, name: str, act: Callable[[], None], style: str = "") -> Button:
        button = Button(description=name, button_style=style, layout=Layout(width="auto"))
        button.on_click(lambda _: act())
        return button

    def _next(self) -> None:
        """Show the next question, or the end. The open one, if any, is left out."""
        self._close()
        self._at += 1
        left = self._minutes - (time.monotonic() - self._begun) / 60
        if self._at >= len(self._planned) or left <= 0:
            self._end("" if left > 0 else f"Time is up: {len(self._planned) - self._at} not reached. ")
            return
        item = self._planned[self._at]
        self._told, self._start, self._area.value = [], time.monotonic(), ""
        self._talk = dialogue.converse(item, self._rng, tries=1 if self._mock else 2)
        self._lead(lambda: next(self._talk))

    def _entered(self) -> None:
        """Enter in the line. The browser sends the key before the text, so the text is read a moment later."""

        def answer() -> None:
            self._waiting = False
            self._answer(self._line.value)

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel: nothing is on its way
            answer()
            return
        if not self._waiting:  # Enter twice is Enter once
            self._waiting = True
            loop.call_later(ENTER_SECONDS, answer)

    def _answer(self, text: str) -> None:
        if self._talk is not None:  # else: Enter in a line that is not asked for
            self._say("checking ...")
            self._lead(lambda: self._talk.send(text))

    def _lead(self, advance: Callable[[], Tell | Ask]) -> None:
        """Show what the conversation tells until it asks; store its outcome when it ends."""
        try:
            outcome = self._told_until_asked(advance)
            if outcome is not None:
                self._store(outcome)
        except UserError as error:  # the log cannot be written: say so, and let the learner go on
            self._say(str(error))
            self._show(None, ["Next question", "Stop"])
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}")
            self._show(None, ["Next question", "Stop"])
            raise  # nbval and the log must see it too

    def _told_until_asked(self, advance: Callable[[], Tell | Ask]) -> Outcome | None:
        """The outcome, when the conversation ended; None when it waits for an answer."""
        try:
            while isinstance(step := advance(), Tell):
                self._told.append(_block(step))
                self._view.value = "".join(self._told)
                advance = self._talk.__next__
        except StopIteration as end:
            return end.value
        self._offer(step)
        return None

    def _store(self, outcome: Outcome) -> None:
        item, self._talk = self._planned[self._at], None
        self._answers.append(session.keep(item, outcome, time.monotonic() - self._start, self._mock))
        word = next(word for word, rating in state.RATINGS.items() if rating == outcome.rating)
        self._view.value += _block(Tell(report.sources_text(item)))
        self._say(f"stored: {word} ({item.id})")
        self._show(None, ["Next question", "Stop"])
        self._ways["Next question"].focus()

    def _offer(self, ask: Ask) -> None:
        """Show the input that fits the question."""
        item = self._planned[self._at]
        left = self._minutes - (time.monotonic() - self._begun) / 60
        self._say(f"{self._at + 1} of {len(self._planned)}: {report.label(item)}; {max(0, left):.0f} minutes left")
        self._prompt.value = f"<b>{html.escape(ask.prompt)}</b>"
        ways = ["Give up"] * ask.can_give_up + ["Skip", "Stop"]
        if ask.form == "choice":
            self._show(None, [*ask.options, *ways])
            return
        self._box = self._area if ask.form in ("code", "lines") else self._line
        if ask.form != "code" or not self._area.value.strip():  # a second try goes on from the first
            self._box.value = ask.initial
        self._box.placeholder = self._box.tooltip = ask.prompt
        self._check.description = "Show the answer" if ask.form == "reveal" else "Check"
        self._show(self._box, ["Check", *ways])
        if len(self._told) > 1 or self._answers:  # never on the first draw: running a cell must not move the focus
            self._box.focus()

    def _show(self, box: Text | Textarea | None, names: Sequence[str]) -> None:
        """Only this box and the buttons of these names are to be seen."""
        for one in (self._line, self._area):
            one.layout.display = None if one is box else "none"
        for name, button in {"Check": self._check, **self._words, **self._ways}.items():
            button.layout.display = None if name in names else "none"
        if not {*names} - {*_WAYS}:
            self._prompt.value = ""

    def _stop(self) -> None:
        self._close()
        self._end("Stopped. ")

    def _close(self) -> None:
        if self._talk is not None:
            self._talk.close()
            self._talk = None

    def _end(self, why: str) -> None:
        if self._mock:
            text = report.score_text(report.score_card(self._answers, self._planned, self._minutes))
        else:
            text = report.practice_text(self._answers, state.cards(state.reviews()))
        self._view.value = f"<pre>{html.escape(text)}</pre>"
        self._say(f"{why}Everything you answered is stored.")
        self._show(None, [])

    def _say(self, text: str) -> None:
        self._status.value = f'<pre role="status" aria-live="polite">{html.escape(text)}</pre>'

    def _first(self, seed: int) -> dict:
        """The first question as a still, with the answer folded, for a page without a kernel."""
        item = self._planned[0]
        question, answer = export.texts(item, seed)
        page = (
            f"<p><b>{html.escape(report.label(item))}</b></p>{render.to_html(question)}"
            f"<details><summary>Show the answer</summary>{render.to_html(answer)}</details>"
        )
        return {"text/html": page, "text/plain": f"{report.label(item)}\n\n{render.to_plain(question)}"}

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return {**super()._repr_mimebundle_(**kwargs), **self._still}


def _block(told: Tell) -> str:
    """One thing told, with a bar at the left."""
    colour, word = _FRAMES[told.role]
    return (
        f'<div style="border-left:4px solid {colour};padding:0 0 0 10px;margin:8px 0;line-height:1.4">'
        f"{word}{render.to_html(told.text)}</div>"
    )
