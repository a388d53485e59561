"""How each kind of drill is asked: a conversation that a terminal and a notebook widget both lead.

`converse(item, rng)` is a generator. It yields `Tell` (something to show) and `Ask` (send back what the learner
typed), and returns an `Outcome`. It stores nothing: whoever leads the conversation may close it at any `Ask`, and
then nothing happened. Input that cannot be an answer is told so in one sentence and asked for again, at no cost.

    conversation = converse(item, random.Random(0))
    step = next(conversation)                       # Tell: the question
    step = next(conversation)                       # Ask
    step = conversation.send("196608")              # Tell: the verdict ...; StopIteration.value is the Outcome

The verdicts are judge.py's; this module only turns them into ratings: good when right at the first try, hard when
right later or half right, again otherwise. Only people say easy.
"""

import inspect
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from finetune_lab.course.drills import judge, links, numbers, state
from finetune_lab.course.drills.schema import Bug, Card, Case, Code, Item, Number

GIVE_UP = "?"
RATINGS = tuple(state.RATINGS)


@dataclass(frozen=True)
class Tell:
    """Something to show. `role`: question, right, wrong, note or answer; `text` is markdown."""

    text: str
    role: str = "note"


@dataclass(frozen=True)
class Ask:
    """Something to answer. `form`: text (one line), lines (one or more of code), code (a file that begins as
    `initial`), reveal (anything, also nothing) or choice (one of `options`). "?" gives up where `can_give_up`."""

    prompt: str
    form: str = "text"
    options: tuple[str, ...] = ()
    initial: str = ""
    can_give_up: bool = False


@dataclass(frozen=True)
class Outcome:
    """What an answer was worth: `score` 0 to 1, `rating` 1 to 4 (as in state.py), `detail` for the log."""

    score: float
    rating: int
    detail: dict = field(default_factory=dict)


Conversation = Generator[Tell | Ask, str, Outcome]


def converse(item: Item, rng: random.Random, tries: int = 2) -> Conversation:
    """The conversation of one item. `rng` draws the numbers; after `tries` wrong answers the solution is shown."""
    return _KINDS[type(item)](item, rng, tries)


def _card(item: Card, rng: random.Random, tries: int) -> Conversation:
    yield Tell(item.question, "question")
    yield Ask("say or type your answer, then Enter shows ours", "reveal")
    yield Tell(item.answer, "answer")
    yield Tell(f"**A common wrong answer:** {item.wrong.says.strip()}\n\n**Why it is wrong:** {item.wrong.because}")
    for more in item.follow_ups:
        yield Tell(f"**They go on:** {more.question}", "question")
        yield Ask("say or type your answer, then Enter shows ours", "reveal")
        yield Tell(more.answer, "answer")
    verdict = yield from _until_judged(
        lambda said: judge.card(item, said), Ask("how well did you know it?", "choice", RATINGS)
    )
    return Outcome(verdict.score, state.RATINGS[verdict.text])


def _number(item: Number, rng: random.Random, tries: int) -> Conversation:
    drawn = numbers.draw(item, rng.randrange(2**31))
    yield Tell(drawn.question, "question")
    unit = f" ({item.unit})" if item.unit else ""
    ask = Ask(f"your number{unit}", can_give_up=True)
    outcome = yield from _tries(tries, ask, lambda said: judge.number(drawn, said))
    yield Tell(drawn.solution, "answer")
    return Outcome(*outcome, {"seed": drawn.seed})


def _bug(item: Bug, rng: random.Random, tries: int) -> Conversation:
    yield Tell(f"{item.question.rstrip()}\n\n```\n{numbered(item.snippet)}\n```", "question")
    lines = item.snippet.rstrip("\n").split("\n")
    named, outcome = False, (0.0, 1)
    for attempt in range(tries):
        line, verdict = yield from _repair(item, lines)
        named |= line == item.line
        if verdict is None:
            break
        if verdict.status == "wrong":
            yield Tell(verdict.text, "wrong")
        else:
            yield Tell("your repair works", "right")
            outcome = (1.0, 3) if attempt == 0 else (0.75, 2)
            break
    else:
        outcome = (0.5, 2) if named else outcome  # finding the line is half of it
    yield Tell(f"Line {item.line} should be\n\n```python\n{item.fix.rstrip()}\n```\n\n{item.explain}", "answer")
    return Outcome(*outcome, {"named_the_line": named})


def _repair(item: Bug, lines: list[str]) -> Generator[Tell | Ask, str, tuple[int | None, judge.Verdict | None]]:
    """A line and what should stand there, until both can be judged; no verdict: the learner gave up."""
    while True:
        said = (yield Ask(f"which line is wrong? (1 to {len(lines)})", can_give_up=True)).strip()
        if said == GIVE_UP:
            return None, None
        if not said.isdecimal() or not 1 <= int(said) <= len(lines):
            yield Tell(f"{said!r} is not a line: name one by its number, 1 to {len(lines)}")
            continue
        line = int(said)
        text = yield Ask(f"what should stand in line {line}?", "lines", initial=lines[line - 1], can_give_up=True)
        if text.strip() == GIVE_UP:
            return line, None
        verdict = judge.bug(item, line, text)
        if verdict.status in ("ok", "wrong"):
            return line, verdict
        yield Tell(verdict.text)


def _code(item: Code, rng: random.Random, tries: int) -> Conversation:
    yield Tell(f"{item.question.rstrip()}\n\n```python\n{item.starter.rstrip()}\n```", "question")
    ask = Ask(f"your code ({item.limit_minutes} minutes)", "code", initial=item.starter, can_give_up=True)
    outcome = yield from _tries(tries, ask, lambda said: judge.code(item, said))
    source = inspect.getsource(links.find(item.reference)).rstrip()
    yield Tell(f"The package does it like this ({item.reference}):\n\n```python\n{source}\n```", "answer")
    return Outcome(*outcome)


def _case(item: Case, rng: random.Random, tries: int) -> Conversation:
    yield Tell(item.question, "question")
    yield Ask(f"talk for {item.minutes} minutes, or type notes, then Enter shows our answer", "reveal")
    yield Tell(item.answer, "answer")
    ticked = set()
    for at, point in enumerate(item.rubric):
        yield Tell(f"**{at + 1} of {len(item.rubric)}:** {point.point.strip()} *({point.why.strip()})*")
        said = yield from _choose(Ask("did you say it? be honest", "choice", ("yes", "no")))
        if said == "yes":
            ticked.add(at)
    verdict = judge.case(item, ticked)
    yield Tell(verdict.text, "right" if verdict.status == "ok" else "wrong")
    rating = 1 if verdict.score < 0.4 else 2 if verdict.score < 0.8 else 3
    return Outcome(verdict.score, rating, {"ticked": sorted(ticked)})


_KINDS: dict[type[Item], Callable[..., Conversation]] = {
    Card: _card,
    Number: _number,
    Bug: _bug,
    Code: _code,
    Case: _case,
}


def _tries(tries: int, ask: Ask, judged: Callable[[str], judge.Verdict]) -> Generator[Tell | Ask, str, tuple]:
    """(score, rating) after at most `tries` wrong answers; what cannot be judged does not count."""
    left = tries
    while left:
        said = yield ask
        if said.strip() == GIVE_UP:
            break
        verdict = judged(said)
        if verdict.printed.strip():
            yield Tell(f"your code printed\n\n```\n{verdict.printed.rstrip()}\n```")
        if verdict.status == "ok":
            yield Tell(verdict.text or "right", "right")
            return (1.0, 3) if left == tries else (0.75, 2)
        yield Tell(verdict.text, "wrong" if verdict.status == "wrong" else "note")
        left -= verdict.status == "wrong"
    return 0.0, 1


def _until_judged(judged: Callable[[str], judge.Verdict], ask: Ask) -> Generator[Tell | Ask, str, judge.Verdict]:
    while (verdict := judged(choice((yield ask), ask.options))).status == "again":
        yield Tell(verdict.text)
    return verdict


def _choose(ask: Ask) -> Generator[Tell | Ask, str, str]:
    while (said := choice((yield ask), ask.options)) not in ask.options:
        yield Tell(f"{said!r} is no answer here: type one of {', '.join(ask.options)}")
    return said


def choice(said: str, options: tuple[str, ...]) -> str:
    """What was typed as one of the options: the word, its beginning or its number from 1; else as it was typed."""
    word = said.strip().lower()
    if word.isdecimal() and 1 <= int(word) <= len(options):
        return options[int(word) - 1]
    return next((option for option in options if word and option.startswith(word)), said.strip())


def numbered(snippet: str) -> str:
    """The snippet with its line numbers."""
    return "\n".join(f"{n:>2}  {line}" for n, line in enumerate(snippet.rstrip("\n").split("\n"), 1))
