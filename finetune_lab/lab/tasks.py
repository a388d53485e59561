"""The five tasks of the tiny world, each with splits by combination and a metric that leaves no room for taste.

    extract   a shop's ticket -> one line of JSON with order, product, issue, action
    answer    a question about a town -> the short fact, as in "It is fish pie."
    math      a sum in a chat -> the number, as in "It is 19."
    reply     a ticket -> the shop's answer, with a rejected answer beside it, judged by a stated rule
    general   plain text of the world (facts, sums, stories): what the base model knew before, the forgetting meter

Items are TRL's conversational prompt-completion rows. The test split holds combinations (and phrasings) that training
never shows; `split_of` in `world` decides by a hash, so no list has to be kept and none can drift. A fourth split,
"combinations", takes the combinations of test and the phrasings of training: it tells the two difficulties apart.
"""

import json
import random
import re

from finetune_lab.errors import UserError
from finetune_lab.methods.metrics import exact_match

from . import documents, world

TASKS = ("extract", "answer", "math", "reply", "general")
SPLITS = (*world.SPLITS, "combinations")
FIELDS = ("order", "product", "issue", "action")
SUM_QUESTIONS = (
    "What is {a} {w} {b}?",
    "{a} {op} {b}",
    "What is {a} {op} {b}?",
    "Please work out {a} {w} {b}.",
    "{a} {w} {b} is what?",
    "How much is {a} {w} {b}?",
    "Tell me what {a} {op} {b} is.",
)


def _item(user: str, answer: str, **more) -> dict:
    return {
        "prompt": [{"role": "user", "content": user}],
        "completion": [{"role": "assistant", "content": answer}],
        **more,
    }


def record(ticket: world.Ticket) -> str:
    """The JSON line that `extract` asks for."""
    return json.dumps({field: getattr(ticket, field) for field in FIELDS})


def _extract(rng: random.Random, split: str) -> dict:
    ticket = world.write_ticket(rng, *rng.choice(_combinations(split)), split)
    return _item(ticket.text, record(ticket), key=(ticket.product, ticket.issue, ticket.action))


def _answer(rng: random.Random, split: str) -> dict:
    fact = rng.choice(_facts(split))
    question = rng.choice(world.phrasings(world.QUESTIONS[fact.attribute], split)).format(t=fact.town)
    return _item(question, f"It is {fact.value}.", key=(fact.town, fact.attribute))


def _math(rng: random.Random, split: str) -> dict:
    s = rng.choice(_sums(split))
    word = "plus" if s.op == "+" else "minus"
    question = rng.choice(world.phrasings(SUM_QUESTIONS, split)).format(a=s.a, b=s.b, op=s.op, w=word)
    return _item(question, f"It is {s.answer}.", key=(s.a, s.op, s.b))


def _reply(rng: random.Random, split: str) -> dict:
    ticket = world.write_ticket(rng, *rng.choice(_combinations(split)), split)
    good, bad = replies(rng, ticket)
    facts = {"order": ticket.order, "product": ticket.product, "action": ticket.action}
    return _item(
        ticket.text,
        good,
        key=(ticket.product, ticket.issue, ticket.action),
        rejected=[{"role": "assistant", "content": bad}],
        facts=facts,
    )


def replies(rng: random.Random, t: world.Ticket) -> tuple[str, str]:
    """A reply that keeps the rule of `reply_faults` and one that breaks it in one way: rude, long or invented."""
    good = rng.choice(
        (
            f"Thank you for writing. We are sorry about the {t.product}. We will arrange the {t.action} for order {t.order}.",
            f"We are sorry. Thank you for your letter about order {t.order}. We will arrange the {t.action}.",
            f"Thank you. We are sorry about order {t.order}. The {t.action} is on its way.",
        )
    )
    bad = rng.choice(
        (
            f"No. Order {t.order} is not our problem.",
            (
                f"{good} Our shop has many lamps and they are all very good and many people like them. "
                "Please look at our other lamps too."
            ),
            f"{good} A gift of {rng.randrange(10, 99)} coins will come with order {documents.code(rng)}.",
        )
    )
    return good, bad


def reply_faults(text: str, facts: dict[str, str], longest: int = 30) -> list[str]:
    """What breaks the rule for a good reply: courteous, concise, no invention, and it names what will be done."""
    faults = []
    low = text.lower()
    if "thank" not in low or "sorry" not in low:
        faults.append("not courteous: it must thank and say sorry")
    if len(text.split()) > longest:
        faults.append(f"not concise: {len(text.split())} words, at most {longest}")
    if any(number != facts["order"] for number in re.findall(r"\d+", text)):
        faults.append("invented: it names a number that the customer did not")
    if any(product in low and product != facts["product"] for product in world.PRODUCTS):
        faults.append("invented: it names another product")
    if facts["action"] not in low:
        faults.append(f"no answer: it does not name the {facts['action']}")
    return faults


def _general(rng: random.Random, split: str) -> dict:
    kind = rng.choice(("fact", "sum", "story"))
    if kind == "fact":
        fact = rng.choice(world.facts())
        text = world.STATEMENTS[fact.attribute][0].format(t=fact.town, v=fact.value)
        start, answer = text[: text.rindex(" " + fact.value)], fact.value
    elif kind == "sum":
        s = rng.choice(_sums(split))
        start, answer = f"{s.a} {s.op} {s.b} =", str(s.answer)
        text = f"{start} {answer}"
    else:
        text = documents.story(rng)
        start, answer = "", ""
    return {"text": text, "kind": kind, "start": start, "answer": answer, "key": (kind, text)}


_WRITERS = {"extract": _extract, "answer": _answer, "math": _math, "reply": _reply, "general": _general}
_CACHE: dict[tuple[str, str], list] = {}


def _cached(name: str, split: str, make) -> list:
    if (name, split) not in _CACHE:
        _CACHE[name, split] = make()
    return _CACHE[name, split]


def _of(split: str) -> str:
    """The split that a split's combinations come from."""
    return "test" if split == "combinations" else split


def _combinations(split: str) -> list:
    return _cached("tickets", split, lambda: world.ticket_combinations(_of(split)))


def _facts(split: str) -> list:
    return _cached("facts", split, lambda: [f for f in world.facts() if f.split == _of(split)])


def _sums(split: str) -> list:
    return _cached("sums", split, lambda: world.sums(_of(split)))


def load_task(name: str, split: str, n: int = 200, seed: int = 0) -> list[dict]:
    """`n` different items of a task; the same arguments give the same items.

    Items of `general` have text, kind (fact, sum, story), start and answer; those of the other tasks have prompt and
    completion (lists of messages) and key, the combination that decides the split; `reply` has rejected and facts too.
    Raises UserError for an unknown task or split, or when the split holds fewer than n different items.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"{name}-{split}-{seed}")
    items, seen, tries = [], set(), 0
    while len(items) < n:
        item = _WRITERS[name](rng, split)
        said = item.get("text") or item["prompt"][-1]["content"]
        tries += 1
        if said not in seen:
            seen.add(said)
            items.append(item)
        elif tries > 20 * n + 1000:
            raise UserError(
                f"task {name!r} has fewer than {n} different items in split {split!r}: ask for {len(items)}"
            )
    return items


def reference(item: dict) -> str:
    """The text that an item expects."""
    return item["answer"] if "kind" in item else item["completion"][-1]["content"]


def _parsed(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def score(name: str, predictions: list[str], items: list[dict]) -> dict[str, float]:
    """Shares between 0 and 1: `exact_match`; for extract also `field_f1`; for reply `good` (no fault by the rule).

    Exact match of extract compares the parsed records, of the other tasks the text without outer white space.
    Raises ValueError when the two lists differ in length.
    """
    if len(predictions) != len(items):
        raise ValueError(f"{len(predictions)} predictions for {len(items)} items: give one each")
    n = max(len(items), 1)
    if name == "reply":
        return {"good": sum(not reply_faults(p, i["facts"]) for p, i in zip(predictions, items, strict=True)) / n}
    if name != "extract":
        return {"exact_match": exact_match(predictions, [reference(i) for i in items])}
    exact = right = given = wanted = 0
    for text, item in zip(predictions, items, strict=True):
        got, want = _parsed(text), json.loads(reference(item))
        exact += got == want
        right += sum(got.get(k) == v for k, v in want.items())
        given, wanted = given + len(got), wanted + len(want)
    return {"exact_match": exact / n, "field_f1": 2 * right / max(given + wanted, 1)}
