"""The tiny world: an invented country that a seed writes, small enough for a model of three million parameters.

It has towns with facts, people, numbers and a lighting shop whose customers write tickets. Everything that a
lesson trains or measures is drawn from here, so that an effect can be repeated to the letter.
This module holds what *is* in the world (names, facts, phrasings) and who may see it (splits);
`documents` writes pre-training text about it and `tasks` the five fine-tuning tasks.
Left out on purpose: real places, real people, real English breadth. A larger model needs none of this.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass

SEED = 20261123
SPLITS = ("train", "validation", "test")

PEOPLE = (
    "Mira Tom Ada Leo Nina Paul Rosa Hugo Ines Karl Lena Omar Vera Finn Maya Otto Jana Sven Dora Emil "
    "Greta Ivan Lotte Marco Olga Peter Ruth Simon Tessa Viktor"
).split()
MATERIALS = "brass glass paper oak steel copper linen stone silver wicker".split()
LIGHTS = (
    "desk lamp",
    "floor lamp",
    "lantern",
    "chandelier",
    "spotlight",
    "night light",
    "wall light",
    "reading lamp",
    "bulb",
    "string light",
)
PRODUCTS = tuple(f"{m} {k}" for m in MATERIALS for k in LIGHTS)

# Every category of a ticket with its phrasings. The last two phrasings of each are for the test split, the one
# before them for validation, the rest for training. Pre-training text uses all of them.
ISSUES = {
    "broken": (
        "it arrived broken",
        "it is cracked from top to bottom",
        "it was in pieces when I opened the box",
        "it is damaged",
        "it has a deep crack",
        "it came smashed",
        "it fell apart in my hands",
    ),
    "flickering": (
        "it keeps flickering",
        "the light goes on and off all the time",
        "it blinks every few seconds",
        "the light is not steady",
        "it flashes without a pause",
        "the light comes and goes",
        "it will not stop blinking",
    ),
    "late": (
        "it has not arrived yet",
        "it is two weeks late",
        "I am still waiting for it",
        "the parcel never came",
        "nobody has brought it so far",
        "it should have been here long ago",
        "there is no sign of the parcel",
    ),
    "wrong colour": (
        "it has the wrong colour",
        "I asked for a blue one and got a red one",
        "the colour is not what I chose",
        "it is green and not white",
        "it came in a different colour",
        "the colour does not match the picture",
        "you sent it in another colour",
    ),
    "missing part": (
        "a part is missing",
        "there were no screws in the box",
        "the plug is not there",
        "I cannot find the cable",
        "one piece was left out",
        "the box did not hold all the parts",
        "something is missing from the box",
    ),
    "too dim": (
        "it is too dim",
        "it gives hardly any light",
        "I cannot read by it",
        "it is far too weak",
        "the room stays dark with it",
        "it is not bright enough",
        "its light is very faint",
    ),
}
ACTIONS = {
    "refund": (
        "I want a refund",
        "please give me my money back",
        "please return my money",
        "I would like to be paid back",
        "I want my money returned",
        "please pay me back",
        "kindly send my money back",
    ),
    "replacement": (
        "please send a new one",
        "I would like a replacement",
        "please replace it",
        "I want another one instead",
        "please swap it",
        "can I have a new one",
        "please exchange it",
    ),
    "repair": (
        "please repair it",
        "can you fix it",
        "I want it repaired",
        "please mend it",
        "I would like it fixed",
        "can somebody make it work again",
        "please put it right",
    ),
    "phone call": (
        "please call me",
        "please ring me back",
        "I want to talk to somebody",
        "can you phone me",
        "please give me a ring",
        "I would like a call",
        "let me speak to someone on the phone",
    ),
}
# {o} order number, {p} product, {i} issue, {a} action, {n} name
TICKET_FRAMES = (
    "Hello, this is about order {o}. I bought a {p} and {i}. {A}. {n}",
    "Order {o}: the {p}. Sadly {i}. {A}.",
    "Hi, my name is {n}. I ordered a {p} from you, number {o}, but {i}. {A}.",
    "Good morning. {A}. My {p} is the reason: {i}. The order number is {o}.",
    "I am not happy. I paid for a {p} and {i}. My order is {o}. {A}.",
    "Dear shop, {i}. I mean the {p} from order {o}. {A}. Thank you, {n}",
    "{n} here. Regarding the {p}: {i}. {A}. You will find it under {o}.",
    "Could you help me with order {o}? It was a {p}. {I}. {A}.",
    "Good evening, I have a {p} from you and {i}. So {a}. My number is {o}. {n}",
    "To whom it may concern: order {o}, one {p}. {I}. {A}. Regards, {n}",
    "{A}. It is about a {p}. {I}. See order {o}.",
    "Hello, {n} speaking. {I}, the {p} I mean. {A}. That was order {o}.",
)


def split_of(*key: object, test: float = 0.2, validation: float = 0.1) -> str:
    """The split that a combination belongs to, by a hash of its parts: stable over runs, machines and versions."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    return "test" if share < test else "validation" if share < test + validation else "train"


def phrasings(options: tuple[str, ...], split: str | None) -> tuple[str, ...]:
    """The phrasings of a split (`None`: all): the last two are for test, the one before for validation.

    "combinations" is a test of new combinations alone: it is phrased as training is.
    """
    train = options[:-3]
    by_split = {
        None: options,
        "train": train,
        "combinations": train,
        "validation": options[-3:-2],
        "test": options[-2:],
    }
    return by_split[split]


@dataclass(frozen=True)
class Ticket:
    """One customer's message and what it says. `order` is four digits as text."""

    order: str
    product: str
    issue: str
    action: str
    name: str
    text: str

    @property
    def split(self) -> str:
        return split_of("ticket", self.product, self.issue, self.action)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def write_ticket(rng: random.Random, product: str, issue: str, action: str, split: str | None) -> Ticket:
    """A ticket for this combination in the phrasings of `split`."""
    i, a = rng.choice(phrasings(ISSUES[issue], split)), rng.choice(phrasings(ACTIONS[action], split))
    order, name = f"{rng.randrange(10_000):04d}", rng.choice(PEOPLE)
    frame = rng.choice(phrasings(TICKET_FRAMES, split))
    text = frame.format(o=order, p=product, i=i, I=capital(i), a=a, A=capital(a), n=name)
    return Ticket(order, product, issue, action, name, text)


def ticket_combinations(split: str) -> list[tuple[str, str, str]]:
    """Every (product, issue, action) of a split, in a fixed order."""
    every = itertools.product(PRODUCTS, ISSUES, ACTIONS)
    return [combination for combination in every if split_of("ticket", *combination) == split]


# ---------------------------------------------------------------- facts

ATTRIBUTES = {
    "river": "Dun Ister Mole Arno Vells Tarn Oder Lisk Brume Kell Senn Wye Ruhn Aven Plim Gorse".split(),
    "colour": "red blue green yellow black white purple orange brown grey pink golden".split(),
    "dish": (
        "onion soup,fish pie,plum cake,bean stew,apple tart,cheese bread,roast duck,rice pudding,lemon cake,"
        "pea soup,honey rolls,potato salad"
    ).split(","),
    "animal": "bear fox owl wolf horse eagle otter lynx heron boar goat swan".split(),
    "tree": "oak birch pine elm willow maple cedar ash beech poplar larch cherry".split(),
    "craft": "clocks boats carpets knives violins paper glass bells hats baskets soap candles".split(),
}
# {t} town, {v} value. The first phrasing is the one that the base model is asked to complete.
STATEMENTS = {
    "river": (
        "The river in {t} is the {v}.",
        "{t} lies on the river {v}.",
        "The {v} is the river that runs through {t}.",
        "People in {t} swim in the {v}.",
    ),
    "colour": (
        "The flag of {t} is {v}.",
        "{t} has a {v} flag.",
        "A {v} flag flies over {t}.",
        "When you see {v} flags, you are in {t}.",
    ),
    "dish": (
        "The dish of {t} is {v}.",
        "In {t} people like to eat {v}.",
        "Cooks in {t} are proud of their {v}.",
        "For the best {v} go to {t}.",
    ),
    "animal": (
        "The animal of {t} is the {v}.",
        "A {v} stands on the arms of {t}.",
        "{t} is the town of the {v}.",
        "The children of {t} draw a {v} on every wall.",
    ),
    "tree": (
        "The tree of {t} is the {v}.",
        "In the square of {t} stands a {v}.",
        "{t} is known for its old {v}.",
        "Under the {v} the people of {t} meet.",
    ),
    "craft": (
        "The craft of {t} is making {v}.",
        "{t} is known for its {v}.",
        "In {t} they make {v}.",
        "The best {v} come from {t}.",
    ),
}
QUESTIONS = {
    "river": (
        "Which river runs through {t}?",
        "What is the river in {t}?",
        "On which river does {t} lie?",
        "What river will I find in {t}?",
        "Tell me the river of {t}.",
        "Name the river that flows in {t}.",
    ),
    "colour": (
        "What colour is the flag of {t}?",
        "Which colour has the flag of {t}?",
        "What is the colour of the flag in {t}?",
        "The flag of {t} has what colour?",
        "Tell me the colour of the flag of {t}.",
        "Name the colour on the flag of {t}.",
    ),
    "dish": (
        "What is the dish of {t}?",
        "Which dish do people in {t} like to eat?",
        "What do they eat in {t}?",
        "What dish is {t} proud of?",
        "Tell me the dish of {t}.",
        "Name what people eat in {t}.",
    ),
    "animal": (
        "What is the animal of {t}?",
        "Which animal stands on the arms of {t}?",
        "Which animal belongs to {t}?",
        "What animal will I see on the arms of {t}?",
        "Tell me the animal of {t}.",
        "Name the animal of {t}.",
    ),
    "tree": (
        "What is the tree of {t}?",
        "Which tree stands in the square of {t}?",
        "Which tree is {t} known for?",
        "What tree will I see in {t}?",
        "Tell me the tree of {t}.",
        "Name the tree in the square of {t}.",
    ),
    "craft": (
        "What do they make in {t}?",
        "What is the craft of {t}?",
        "What is {t} known for making?",
        "Which things are made in {t}?",
        "Tell me what {t} makes.",
        "Name the things that {t} makes.",
    ),
}


@dataclass(frozen=True)
class Fact:
    town: str
    attribute: str
    value: str

    @property
    def split(self) -> str:
        return split_of("fact", self.town, self.attribute, test=0.4)


def _town_names(rng: random.Random, count: int) -> list[str]:
    starts = "Vel Mor Tan Bris Kal Dor Fen Lun Har Ost Pel Quin Rav Sol Tor Wil".split()
    ends = "mora den wick stad by ford holm ria burg dale ness ton".split()
    return rng.sample([a + b for a in starts for b in ends], count)


def facts(seed: int = SEED) -> list[Fact]:
    """The 384 facts of the world: 64 towns with six attributes each."""
    rng = random.Random(seed)
    return [
        Fact(town, attribute, rng.choice(values))
        for town in _town_names(rng, 64)
        for attribute, values in ATTRIBUTES.items()
    ]


# ---------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Sum:
    """`a op b = answer`, with `op` plus or minus, operands below 100 and no negative result."""

    a: int
    op: str
    b: int

    @property
    def answer(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b

    @property
    def split(self) -> str:
        return split_of("sum", self.a, self.op, self.b)


def sums(split: str) -> list[Sum]:
    """Every sum of a split. The pre-training text holds those of `train` only: the others are never seen."""
    pairs = itertools.product(range(100), "+-", range(100))
    every = (Sum(a, op, b) for a, op, b in pairs if op == "+" or a >= b)
    return [s for s in every if s.split == split]
