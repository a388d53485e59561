"""The tiny world: the same for the same seed, and honest about who may see what."""

import itertools
import json
import random

import pytest

from finetune_lab.errors import UserError
from finetune_lab.lab import documents, tasks, world


def text_of(count: int, seed: int = 0, ramp: int = 0, kinds=documents.KINDS) -> list[str]:
    return list(itertools.islice(documents.documents(seed, ramp, kinds), count))


PARTS = pytest.mark.parametrize("kinds", [documents.KINDS, documents.LATER_KINDS], ids=["first part", "second part"])


def test_the_same_seed_writes_the_same_world():
    assert text_of(200) == text_of(200)
    assert text_of(200, seed=0) != text_of(200, seed=1)
    assert tasks.load_task("extract", "train", 50, seed=3) == tasks.load_task("extract", "train", 50, seed=3)


@pytest.mark.parametrize("task", ("extract", "answer", "math", "reply"))  # of `general` only the sums have splits
def test_no_test_combination_is_in_training(task):
    tested = {item["key"] for item in tasks.load_task(task, "test", 200)}
    for seed in range(5):
        assert not tested & {item["key"] for item in tasks.load_task(task, "train", 400, seed)}


@pytest.mark.parametrize(("task", "table"), [("extract", world.ISSUES), ("answer", world.QUESTIONS)])
def test_test_phrasings_are_not_in_training(task, table):
    prompts = " ".join(i["prompt"][0]["content"].lower() for i in tasks.load_task(task, "train", 400))
    for options in table.values():
        for phrase in world.phrasings(options, "test"):
            assert phrase.split("{t}")[0].lower() not in prompts


@PARTS
def test_pre_training_never_shows_a_sum_of_the_test_split(kinds):
    unseen = {f"{s.a} {s.op} {s.b} = " for s in world.sums("test")} | {
        f"{s.a} {s.op} {s.b}\n" for s in world.sums("test")
    }
    lines = [line + "\n" for text in text_of(4000, kinds=kinds) for line in text.replace("Q: ", "").split("\n")]
    assert sum(" + " in line or " - " in line for line in lines) > 1000  # sums are there
    assert not [line for line in lines if line in unseen or line.split("= ")[0] + "= " in unseen]


@PARTS
def test_pre_training_never_shows_the_record_that_extract_asks_for(kinds):
    for text in text_of(4000, kinds=kinds):
        for start in [i for i, c in enumerate(text) if c == "{"]:
            try:
                record, _ = json.JSONDecoder().raw_decode(text[start:])
            except json.JSONDecodeError:
                continue
            assert set(record) != set(tasks.FIELDS)


def test_pre_training_never_shows_a_ticket_of_a_test_combination():
    pen = documents.Pen(0)
    assert {documents.lamp_letter(pen).split for _ in range(2000)} == {"train"}


def test_the_easy_start_reaches_few_towns_and_small_numbers():
    pen = documents.Pen(0)
    pen.reach = 0.1
    pages = " ".join(documents.town_page(pen) + documents.quiz(pen) for _ in range(200))
    assert len({fact.town for fact in world.facts() if fact.town in pages}) <= 7
    assert max(max(s.a, s.b) for s in (documents.some_sum(pen) for _ in range(200))) <= 18
    start = text_of(500, ramp=100_000)
    assert sum(text.startswith("Copy this") for text in start) > sum(t.startswith("Copy this") for t in text_of(500))


def test_every_sum_is_right_and_not_negative():
    for split in world.SPLITS:
        for s in world.sums(split):
            assert s.answer == (s.a + s.b if s.op == "+" else s.a - s.b) >= 0


@pytest.mark.parametrize("split", world.SPLITS)
def test_a_ticket_says_what_its_record_says(split):
    rng = random.Random(1)
    for product, issue, action in world.ticket_combinations(split)[:200]:
        t = world.write_ticket(rng, product, issue, action, split)
        low = t.text.lower()
        assert t.order in low and product in low
        assert any(p.lower() in low for p in world.ISSUES[issue]) and any(
            p.lower() in low for p in world.ACTIONS[action]
        )
        assert t.split == split


def test_the_reference_answers_score_full_marks():
    for task in ("extract", "answer", "math", "reply"):
        items = tasks.load_task(task, "test", 60)
        result = tasks.score(task, [tasks.reference(i) for i in items], items)
        assert set(result.values()) == {1.0}


def test_a_rejected_reply_always_breaks_the_rule_and_a_chosen_one_never():
    for item in tasks.load_task("reply", "train", 300):
        assert not tasks.reply_faults(tasks.reference(item), item["facts"])
        assert tasks.reply_faults(item["rejected"][0]["content"], item["facts"])


def test_extract_counts_fields_and_forgives_only_spaces_in_the_json():
    items = tasks.load_task("extract", "test", 4)
    want = [json.loads(tasks.reference(i)) for i in items]
    wrong_order = want[1] | {"order": "none"}
    said = [json.dumps(want[0], separators=(",", ":")), json.dumps(wrong_order), "no json", "[" * 2000]
    result = tasks.score("extract", said, items)
    assert result["exact_match"] == 0.25
    assert result["field_f1"] == pytest.approx(2 * 7 / (8 + 16))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("extrakt", "test"), "unknown task 'extrakt'"),
        (("extract", "dev"), "unknown split 'dev'"),
        (("answer", "test", 10_000), "fewer than 10000 different items"),
    ],
)
def test_a_wrong_request_gets_one_sentence(call, says):
    with pytest.raises(UserError, match=says):
        tasks.load_task(*call)
