"""A bank of hand-written items for the practice tests, and learners that answer them."""

from finetune_lab.course.drills import dialogue, numbers
from finetune_lab.course.drills.schema import (
    Bug,
    Card,
    Case,
    Code,
    CommonMistake,
    FollowUp,
    Number,
    Point,
    Source,
    WrongFix,
    WrongNumber,
)


def place(id, kind, topic="completion-labels", lesson="01", level="basic", minutes=3, tags=("masking",), section=None):
    return {
        "id": id, "kind": kind, "topic": topic, "lesson": lesson, "level": level, "minutes": minutes, "tags": tags,
        "section": section, "rows": (), "sources": (Source("LoRA", arxiv="2106.09685"),), "file": "test.yml",
    }  # fmt: skip


def card(id="a-card", **where):
    return Card(
        question=f"What is $r < d$ in {id}?",
        answer="The **rank**, with $B A x$ and `a < b`.",
        follow_ups=(FollowUp("And alpha?", "A scale: $\\alpha / r$."),),
        wrong=CommonMistake("The learning rate.", "It is a size."),
        **place(id, "card", **where),
    )


def number(id="a-number", **where):
    return Number(
        question="How many numbers has a {n} by {m} matrix?",
        draw={"n": {"low": 2, "high": 90, "step": 1}, "m": [3, 5, 7]},
        compute="finetune_lab.methods.counts:lora_parameters",
        arguments={"in_features": "n", "out_features": "m", "rank": 1},
        unit="parameters",
        tolerance=0,
        solution="{n} + {m} = {answer}",
        wrong=(WrongNumber("You doubled it.", factor=2),),
        **place(id, "number", **where),
    )


def bug(id="a-bug", **where):
    return Bug(
        question="Which line?",
        snippet="def run():\n    total = 0\n    return total - 1\n",
        line=3,
        fix="return total + 1",
        explain="It must count up.",
        detector="none_of_the_bank",
        wrong_fixes=(WrongFix("return total", "nothing is added"), WrongFix("return 1 - total", "wrong way round")),
        **place(id, "bug", **where),
    )


def code(id="a-code", **where):
    return Code(
        question="Write positions.",
        starter="def positions_from_mask(attention_mask):\n    raise NotImplementedError\n",
        reference="finetune_lab.methods.chat:completion_labels",
        exercise="positions_from_mask",
        limit_minutes=5,
        **place(id, "code", **where),
    )


def case(id="a-case", **where):
    return Case(
        question="70B, eight GPUs, the loss does not fall: go.",
        answer="Look at the data first.",
        rubric=tuple(Point(f"point {n}", 1 + n % 3, f"because {n}") for n in range(5)),
        **place(id, "case", **{"minutes": 10, **where}),
    )


def one_of_each():
    return [card(), number(), bug(), code(), case()]


def lead(conversation, answer):
    """(what was told, what was asked, the outcome) of a conversation in which `answer(ask)` answers."""
    told, asked, step = [], [], next(conversation)
    try:
        while True:
            if isinstance(step, dialogue.Tell):
                told.append(step)
                step = next(conversation)
            else:
                asked.append(step)
                step = conversation.send(answer(step))
    except StopIteration as end:
        return told, asked, end.value


def right_number(item, rng_seed):
    """What the number drill's answer is when `converse` is given Random(rng_seed)."""
    import random

    return str(numbers.draw(item, random.Random(rng_seed).randrange(2**31)).answer)
