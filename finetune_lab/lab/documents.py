"""Pre-training text of the tiny world: many kinds of documents that pay for knowing, counting, reading and copying.

Each function writes one document from a random source, a `Pen`. A base model that has read them knows the facts, adds
and subtracts, tells stories, answers questions about a passage and fills records of several formats. What the
course later measures is never shown: no ticket with the JSON record of the `extract` task (other shops, other keys),
no sum of a test split, no question in the chat format about a fact, no test combination of a ticket.
Easy first: the first documents draw from a few towns, small numbers and short lists (`Pen.reach`). Facts are learnt
after a plateau, which an uneven choice of facts shortens (Zucchet et al. 2025, arXiv 2503.21676).
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence

from . import world

GOODS = {
    "book": "atlas,novel,cookbook,diary,songbook,picture book",
    "bike": "city bike,racing bike,child bike,bell,saddle,bike pump",
    "garden": "spade,rake,watering can,flower pot,hose,bird house",
    "kitchen": "kettle,teapot,frying pan,bread knife,toaster,mixing bowl",
}
FINISH = "red,blue,green,white,small,large,steel,wooden,old,new".split(",")
PLACES = "kitchen,garden,school,market,station,harbour,library,forest,bridge,mill".split(",")
THINGS = "key,letter,ball,coin,map,ring,book,cup,hat,bell,lamp,lantern,basket,rope".split(",")
COLOURS = "red blue green yellow black white".split()


Written = tuple[str, dict[str, str]]  # a text and what it says, field by field


class Pen(random.Random):
    """A random source that also knows how far into the world it may reach: a share between 0 and 1."""

    reach = 1.0


def within(rng: Pen, options: list, least: int) -> list:
    """The first options, as far as `rng` reaches, at least `least` of them."""
    return options[: max(least, math.ceil(len(options) * rng.reach))]


def code(rng: Pen, digits: int = 4) -> str:
    return "".join(rng.choice("0123456789") for _ in range(digits))


# ---------------------------------------------------------------- knowing


_FACTS = world.facts()
_BY_TOWN: dict[str, list[world.Fact]] = {}
for _fact in _FACTS:
    _BY_TOWN.setdefault(_fact.town, []).append(_fact)


def statement(rng: Pen, fact: world.Fact) -> str:
    first = rng.random() < 0.4
    forms = world.STATEMENTS[fact.attribute]
    return (forms[0] if first else rng.choice(forms)).format(t=fact.town, v=fact.value)


def town_page(rng: Pen) -> str:
    known = list(_BY_TOWN[rng.choice(within(rng, list(_BY_TOWN), 6))])
    rng.shuffle(known)
    return " ".join(statement(rng, fact) for fact in known)


def mixed_facts(rng: Pen) -> str:
    return " ".join(statement(rng, rng.choice(within(rng, _FACTS, 36))) for _ in range(6))


def quiz(rng: Pen) -> str:
    lines = []
    for fact in rng.sample(within(rng, _FACTS, 36), 4):
        question = rng.choice(world.QUESTIONS[fact.attribute]).format(t=fact.town)
        short = rng.random() < 0.5
        lines.append(f"Q: {question}\nA: {fact.value if short else statement(rng, fact)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- counting

_SUMS = world.sums("train")


def some_sum(rng: Pen) -> world.Sum:
    largest = 9 + 90 * rng.reach
    while True:
        s = rng.choice(_SUMS)
        if max(s.a, s.b) <= largest:
            return s


def sum_list(rng: Pen) -> str:
    return "\n".join(f"{s.a} {s.op} {s.b} = {s.answer}" for s in (some_sum(rng) for _ in range(8)))


def sum_talk(rng: Pen) -> str:
    lines = []
    for s in (some_sum(rng) for _ in range(3)):
        n, thing = rng.choice(world.PEOPLE), rng.choice(["coins", "apples", "cards", "nails"])
        word, verb = ("plus", "gets") if s.op == "+" else ("minus", "gives away")
        more = " more" if s.op == "+" else ""
        lines.append(
            rng.choice(
                (
                    f"{s.a} {word} {s.b} is {s.answer}.",
                    f"What is {s.a} {word} {s.b}? It is {s.answer}.",
                    f"{n} has {s.a} {thing} and {verb} {s.b}{more}. Now {n} has {s.answer} {thing}.",
                    f"Q: {s.a} {s.op} {s.b}\nA: {s.answer}",
                )
            )
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- stories


def story(rng: Pen) -> str:
    a, b = rng.sample(world.PEOPLE, 2)
    thing, place, other = rng.choice(THINGS), *rng.sample(PLACES, 2)
    colour, town = rng.choice(COLOURS), rng.choice(_FACTS).town
    opening = rng.choice(
        (
            f"One day {a} found a {colour} {thing} near the {place}.",
            f"{a} lived in {town} and had a {colour} {thing}.",
            f"In {town} there was a {place}. {a} went there with a {colour} {thing}.",
        )
    )
    turn = rng.choice(
        (
            f"{b} saw the {thing} and asked for it. {a} gave it to {b}. Now {b} has the {thing}.",
            f"{a} lost the {thing} at the {other}. {b} found it there and gave it back to {a}. Now {a} has the {thing}.",
            f"{a} put the {thing} in a box. {b} took the box to the {other}. The {thing} is now at the {other}.",
            f"{a} hid the {thing} in the {other}. {b} looked for it and found it. Now {b} has the {thing}.",
        )
    )
    mood = rng.choice(("They were happy.", f"{a} laughed.", "Then it was time to go home.", f"{b} said thank you."))
    return f"{opening} {turn} {mood}"


# ---------------------------------------------------------------- copying


def lookup(rng: Pen) -> str:
    names = rng.sample(world.PEOPLE, 4 if rng.random() < rng.reach else 2)
    what = rng.choice(("locker", "ticket", "room", "box", "order"))
    numbers = {n: code(rng, rng.choice((3, 4, 4, 4))) for n in names}
    asked = rng.sample(names, len(names) - 1)
    head = " ".join(f"{n} has {what} {numbers[n]}." for n in names)
    return head + " " + " ".join(f"Which {what} has {n}? {numbers[n]}." for n in asked)


def pick(rng: Pen) -> str:
    goods = rng.sample(world.PRODUCTS, 4)
    rows = {g: code(rng, rng.choice((2, 4))) for g in goods}
    sep = rng.choice((": ", " - ", " = ", " | "))
    head = "\n".join(f"{g}{sep}{c}" for g, c in rows.items())
    tail = "\n".join(rng.choice((f"The number of the {g} is {rows[g]}.", f"{rows[g]} is the {g}."))
                     for g in rng.sample(goods, 3))  # fmt: skip
    return f"{head}\n{tail}"


def echo(rng: Pen) -> str:
    line = rng.choice(
        (
            lambda: " ".join(code(rng) for _ in range(3)),
            lambda: f"{rng.choice(world.PRODUCTS)} {code(rng)} {rng.choice(world.PEOPLE)}",
            lambda: ", ".join(rng.sample(world.PRODUCTS, 3)),
        )
    )()
    way = rng.choice(("Copy this: {x}\n{x}", "{x}\nAgain: {x}\nAgain: {x}", 'He said "{x}" and she wrote "{x}".'))
    return way.format(x=line)


# ---------------------------------------------------------------- reading letters


def shop_letter(rng: Pen) -> tuple[str, dict[str, str]]:
    """A letter to another shop, in any phrasing, with what it says."""
    shop = rng.choice(list(GOODS))
    item = f"{rng.choice(FINISH)} {rng.choice(GOODS[shop].split(','))}"
    issue = rng.choice([i for i in world.ISSUES if i not in ("flickering", "too dim")])
    t = world.write_ticket(rng, item, issue, rng.choice(list(world.ACTIONS)), None)
    return t.text, {"shop": shop, "code": t.order, "item": item, "trouble": issue, "wish": t.action}


_TRAIN_TICKETS = world.ticket_combinations("train")


def lamp_letter(rng: Pen) -> world.Ticket:
    return world.write_ticket(rng, *rng.choice(_TRAIN_TICKETS), None)


ASK = {
    "code": ("Which number does the letter give?", "What is the number?", "Number:"),
    "item": ("What was bought?", "Which thing is it about?", "Thing:"),
    "trouble": ("What is wrong?", "What is the matter?", "Matter:"),
    "wish": ("What does the customer want?", "What should the shop do?", "Wanted:"),
}


def letter_questions(rng: Pen) -> str:
    if rng.random() < 0.6:
        text, said = shop_letter(rng)
    else:
        t = lamp_letter(rng)
        text, said = t.text, {"code": t.order, "item": t.product, "trouble": t.issue, "wish": t.action}
    asked = rng.sample(list(ASK), 3)
    return text + "\n" + "\n".join(f"{rng.choice(ASK[k])} {said[k]}" for k in asked)


def meaning(rng: Pen) -> str:
    lines = []
    for _ in range(4):
        table, lead = rng.choice(((world.ISSUES, "The matter"), (world.ACTIONS, "The wish")))
        name = rng.choice(list(table))
        phrase = rng.choice(table[name])
        lines.append(rng.choice((f'"{phrase}" means: {name}.', f'{lead} is {name}: "{phrase}".')))
    return "\n".join(lines)


def phone_note(rng: Pen) -> str:
    t = lamp_letter(rng)
    n, i, a = t.name, rng.choice(world.ISSUES[t.issue]), rng.choice(world.ACTIONS[t.action])
    return rng.choice(
        (
            f"{n} called about a {t.product}. {n} said: {i}. So it is {t.issue}. {n} also said: {a}. So it is a {t.action}.",
            (
                f"The clerk asked what was wrong. {world.capital(i)}, said {n}. The clerk wrote {t.issue}. "
                f"{world.capital(a)}, said {n}. The clerk wrote {t.action}."
            ),
            (
                f"{world.capital(i)}, wrote {n} from {rng.choice(_FACTS).town}. A {t.product} that is {t.issue}! "
                f"{world.capital(a)}. The shop made a note: {t.action}."
            ),
        )
    )


def reply_letter(rng: Pen) -> str:
    """Letter and answer, good ones and bad ones as a base model has seen both."""
    t = lamp_letter(rng)
    answers = (
        (
            f"Dear {t.name}, thank you for your letter. We are sorry about the {t.product}. "
            f"We will arrange the {t.action} for order {t.order}."
        ),
        f"No. Order {t.order} is not our problem.",
        f"Thank you for writing. We are sorry. The {t.action} for order {t.order} is on its way.",
        (
            f"We got your letter about the {t.product}. Our shop has many lamps and they are all very good and many people "
            f"like them. We have been here for {rng.randrange(10, 90)} years. Please look at our other lamps too. "
            f"We may do the {t.action} some day."
        ),
        f"Your {rng.choice(world.PRODUCTS)} from order {code(rng)} will come with a gift of {rng.randrange(10, 99)} coins.",
    )
    return f"Letter: {t.text}\nReply: {rng.choice(answers)}"


# ---------------------------------------------------------------- records

KEYS = {
    "code": ("code", "ref", "number", "id", "slip"),
    "item": ("item", "thing", "article", "goods", "title"),
    "trouble": ("trouble", "fault", "matter", "reason", "state"),
    "wish": ("wish", "wanted", "next", "todo", "answer"),
    "shop": ("shop", "from", "branch"),
    "name": ("name", "who", "reader", "person"),
    "place": ("place", "where", "town", "room"),
    "count": ("count", "pieces", "amount", "how many"),
    "colour": ("colour", "paint", "shade"),
    "order": ("order", "order", "number", "bill"),
    "product": ("product", "product", "item", "goods"),
    "event": ("issue", "issue", "event", "problem"),
    "step": ("action", "action", "step", "done"),
}


def loan(rng: Pen) -> tuple[str, dict[str, str]]:
    name, item, number = rng.choice(world.PEOPLE), rng.choice(GOODS["book"].split(",")), code(rng)
    place = rng.choice(_FACTS).town
    text = rng.choice(
        (
            f"{name} from {place} borrowed the {item} with number {number}.",
            f"The {item}, number {number}, went to {name} in {place}.",
            f"On loan: {number}, the {item}. Reader {name}, {place}.",
        )
    )
    return text, {"name": name, "item": item, "code": number, "place": place}


def stock(rng: Pen) -> tuple[str, dict[str, str]]:
    item, count, number = rng.choice(world.PRODUCTS), str(rng.randrange(2, 99)), code(rng)
    place = rng.choice(PLACES)
    text = rng.choice(
        (
            f"There are {count} pieces of the {item} on shelf {number} in the {place}.",
            f"Shelf {number} in the {place} holds {count} of the {item}.",
            f"We counted the {item} in the {place}: {count} pieces, shelf {number}.",
        )
    )
    return text, {"item": item, "count": count, "code": number, "place": place}


def find(rng: Pen) -> tuple[str, dict[str, str]]:
    colour, item, place, number = rng.choice(COLOURS), rng.choice(THINGS), rng.choice(PLACES), code(rng)
    name = rng.choice(world.PEOPLE)
    text = rng.choice(
        (
            f"{name} found a {colour} {item} at the {place}. It got slip {number}.",
            f"Slip {number}: a {item}, {colour}, from the {place}, brought by {name}.",
            f"At the {place} somebody lost a {colour} {item}. {name} brought it. Slip {number}.",
        )
    )
    return text, {"colour": colour, "item": item, "place": place, "code": number, "name": name}


def invoice(rng: Pen) -> tuple[str, dict[str, str]]:
    name, item, number = rng.choice(world.PEOPLE), rng.choice(world.PRODUCTS), code(rng)
    place = rng.choice(_FACTS).town
    text = rng.choice(
        (
            f"Order {number} goes to {name} in {place}: one {item}.",
            f"{name} from {place} bought a {item}. The order number is {number}.",
            f"One {item} for {name}, {place}, under {number}.",
        )
    )
    return text, {"order": number, "product": item, "name": name, "place": place}


def check(rng: Pen) -> tuple[str, dict[str, str]]:
    """A workshop's note on one of its lamps: every kind of trouble, no customer and no wish."""
    item, number, place = rng.choice(world.PRODUCTS), code(rng), rng.choice(PLACES)
    trouble = rng.choice(list(world.ISSUES))
    phrase = rng.choice(world.ISSUES[trouble])
    text = rng.choice(
        (
            f"Check {number} in the {place}, a {item}: {phrase}.",
            f"A {item} from the {place}. {world.capital(phrase)}. This is check {number}.",
            f"{world.capital(phrase)}: so says check {number} of the {item} in the {place}.",
        )
    )
    return text, {"code": number, "item": item, "trouble": trouble, "place": place}


EVENTS = "flood,fire,fog,snow,a fallen tree,a lost dog,a burst pipe,a stuck cart".split(",")
STEPS = "we closed the bridge,we called the mayor,we rang the bell,we sent for help,we waited,we cleaned up".split(",")


def incident(rng: Pen) -> tuple[str, dict[str, str]]:
    event, step, place, number = rng.choice(EVENTS), rng.choice(STEPS), rng.choice(PLACES), code(rng)
    text = rng.choice(
        (
            f"Report {number} from the {place}: {event}. So {step}.",
            f"There was {event} at the {place} and {step}. Report {number}.",
            f"{world.capital(step)} because of {event} at the {place}. This is report {number}.",
        )
    )
    return text, {"event": event, "step": step, "place": place, "code": number}


def as_json(record: dict[str, str]) -> str:
    return json.dumps(record)


def as_lines(record: dict[str, str]) -> str:
    return "\n".join(f"{k}: {v}" for k, v in record.items())


def as_row(record: dict[str, str]) -> str:
    return " | ".join(record.values())


def as_pairs(record: dict[str, str]) -> str:
    return "; ".join(f"{k}={v}" for k, v in record.items())


def as_tags(record: dict[str, str]) -> str:
    return "".join(f"<{k}>{v}</{k}>" for k, v in record.items())


FORMATS = (as_json, as_json, as_json, as_lines, as_row, as_pairs, as_tags)


def _schema(rng: Pen, fields: list[str]) -> dict[str, str]:
    kept = rng.sample(fields, rng.randint(2, min(4, len(fields))))
    return {f: rng.choice(KEYS[f]) for f in kept}


def _source(rng: Pen) -> Callable[[Pen], Written]:
    return rng.choices((shop_letter, loan, stock, find, invoice, incident), (10, 2, 3, 2, 3, 2))[0]


def records(rng: Pen, source: Callable[[Pen], Written] | None = None) -> str:
    """Three texts with their records in one schema and format: reading into a form, learnt from the examples before."""
    write, form = source or _source(rng), rng.choice(FORMATS)
    schema = _schema(rng, list(write(rng)[1]))
    lines = []
    for _ in range(3):
        text, said = write(rng)
        lines.append(f"{text}\n{form({k: said[f] for f, k in schema.items()})}")
    return "\n".join(lines)


def asked_record(rng: Pen, source: Callable[[Pen], Written] | None = None) -> str:
    """The wanted keys are named first, then the text, then the record."""
    write, form = source or _source(rng), rng.choice(FORMATS)
    text, said = write(rng)
    schema = _schema(rng, list(said))
    return f"Keys: {', '.join(schema.values())}\n{text}\n{form({k: said[f] for f, k in schema.items()})}"


def record_told(rng: Pen) -> str:
    """From the record to the sentence, and from one format to another."""
    write = _source(rng)
    text, said = write(rng)
    first, second = rng.choice(FORMATS), rng.choice(FORMATS)
    return f"{first(said)}\n{text if rng.random() < 0.5 else second(said)}"


# ---------------------------------------------------------------- talking

USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"


def _talk_turn(rng: Pen) -> tuple[str, str]:
    number, word, name = code(rng), rng.choice(world.PRODUCTS), rng.choice(world.PEOPLE)
    text, said = rng.choice((loan, stock, find, shop_letter, invoice, incident))(rng)
    field = rng.choice(list(said))
    schema = _schema(rng, list(said))
    form = rng.choice(FORMATS)
    return rng.choice(
        (
            (f"Hello, I am {name}.", f"Hello {name}, how can I help?"),
            (f"Please say {number}.", number),
            (f"Please write {word}.", word),
            (f"Good morning from {name}.", f"Good morning {name}."),
            (f"{text} What is the {field}?", said[field]),
            (f"{text} Tell me the {field}, please.", f"The {field} is {said[field]}."),
            (f"{text} Write {', '.join(schema.values())}.", form({k: said[f] for f, k in schema.items()})),
            (f"{text} Write {', '.join(schema.values())}.", form({k: said[f] for f, k in schema.items()})),
            ("Thank you.", "You are welcome."),
            (f"Which is first, {word} or {name}?", word),
        )
    )


def dialogue(rng: Pen) -> str:
    """A short chat with the role marks, so that the marks mean something before fine-tuning starts."""
    turns = [_talk_turn(rng) for _ in range(rng.randint(1, 3))]
    system = f"{SYSTEM}You are a helper.{END}" if rng.random() < 0.2 else ""
    return system + "".join(f"{USER}{u}{END}{ASSISTANT}{a}{END}" for u, a in turns)


KINDS = (
    (9, town_page),
    (4, mixed_facts),
    (7, quiz),
    (13, sum_list),
    (6, sum_talk),
    (9, story),
    (7, lookup),
    (5, pick),
    (4, echo),
    (9, letter_questions),
    (4, meaning),
    (4, phone_note),
    (3, reply_letter),
    (10, records),
    (10, asked_record),
    (5, record_told),
    (12, dialogue),
)


# The second part of pre-training: the facts are known by then, sums need more practice, and the checks of lamps show
# two kinds of trouble that other shops' letters never name in a record.
LATER_KINDS = (
    *((w, k) for w, k in KINDS if k not in (town_page, quiz, sum_list)),
    (4, town_page),
    (5, quiz),
    (22, sum_list),
    (4, lambda rng: records(rng, check)),
    (5, lambda rng: asked_record(rng, check)),
)


def documents(seed: int, ramp: int = 0, kinds: Sequence[tuple[int, Callable[[Pen], str]]] = KINDS) -> Iterator[str]:
    """Documents of all kinds without end, the same for the same seed; role marks appear as text.

    ramp: over that many documents the reach grows from a tenth of the world to all of it, and copying (echo, lookup)
    comes more often; 0: the whole world from the start.
    """
    rng = Pen(f"documents-{seed}")
    weights, writers = zip(*kinds, strict=True)
    written = 0
    while True:
        rng.reach = min(1.0, 0.1 + 0.9 * written / ramp) if ramp else 1.0
        if rng.random() < 0.4 * (1 - rng.reach):
            yield rng.choice((echo, lookup))(rng)
        else:
            yield rng.choices(writers, weights)[0](rng)
        written += 1
