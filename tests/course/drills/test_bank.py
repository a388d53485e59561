"""What every item of the bank must keep, whoever adds it: answers are computed, mistakes get their hint, links resolve."""

import importlib
import inspect
import math
import re
from collections import Counter

import pytest

from finetune_lab.course import checks
from finetune_lab.course.drills import child, exercises, judge, links, numbers, schema
from finetune_lab.course.drills.schema import Bug, Code, Number

ITEMS = schema.load()
DRAWS = range(25)
SEEDS = range(3)


def of(kind):
    return pytest.mark.parametrize("item", [i for i in ITEMS if isinstance(i, kind)], ids=lambda item: item.id)


def detector(item):
    return links.find(f"finetune_lab.course.drills.detectors:{item.detector}")


def test_everything_that_an_item_names_is_there():
    assert links.problems(ITEMS) == []


def test_all_interview_questions_of_the_notes_are_asked():
    covered = {row for item in ITEMS for row in item.rows}
    assert {f"S{row}" for row in range(231, 256)} - covered == set()


def test_the_bank_has_sixty_items_of_every_kind_and_level():
    counts = schema.counts(ITEMS)
    assert sum(counts["kind"].values()) == len(ITEMS) >= 60
    assert min(counts["kind"].values()) >= 6, counts["kind"]
    assert min(counts["level"].values()) >= 12, counts["level"]


def test_no_question_is_asked_twice():
    texts = Counter(" ".join(item.question.split()).casefold() for item in ITEMS if not isinstance(item, Bug))
    assert [text for text, n in texts.items() if n > 1] == []


def test_texts_name_no_folder_of_a_machine():
    folders = "|".join(f"/{name}/" for name in ("home", "root", "tmp", "usr", "var", "work"))
    for path in schema.BANK.glob("*.yml"):
        assert re.findall(folders, path.read_text("utf-8")) == [], path.name


# numbers


@of(Number)
def test_the_answer_is_computed_and_equals_the_solutions_number(item):
    answers = set()
    for seed in DRAWS:
        drawn = numbers.draw(item, seed)
        assert type(drawn.answer) in (int, float) and math.isfinite(drawn.answer)
        printed = re.findall(r"\{answer[^{}]*\}", item.solution)[-1].format(answer=drawn.answer)
        assert printed in drawn.solution
        assert "{" not in re.sub(r"\$[^$]*\$", "", drawn.question + drawn.solution), "a template was left unfilled"
        verdict = judge.number(drawn, f"{printed} {item.unit}")
        assert verdict.status == "ok", f"seed {seed}: the solution prints {printed}: {verdict.text}"
        assert judge.number(drawn, f"{drawn.answer!r} {item.unit}").status == "ok"
        answers.add(drawn.answer)
    assert len(answers) > 1, "every draw has the same answer"


@of(Number)
def test_wrong_numbers_are_rejected_with_their_hint(item):
    alone = set()  # hints that stood alone in some draw: two mistakes may give the same number, not always
    for seed in DRAWS:
        drawn = numbers.draw(item, seed)
        for value, hint in drawn.wrong:
            verdict = judge.number(drawn, f"{value!r} {item.unit}")
            assert verdict.status == "wrong" and hint in verdict.text, f"seed {seed}: {value} of {drawn.answer}"
            alone |= {verdict.text} & {hint}
        for mistake in item.unit_mistakes:
            verdict = judge.number(drawn, f"{drawn.answer * mistake.factor!r} {item.unit}")
            assert (verdict.status, verdict.text) == ("again", mistake.hint), f"seed {seed}"
    assert alone == {mistake.hint for mistake in item.wrong}


@of(Number)
def test_another_unit_costs_nothing_and_a_wrong_size_is_wrong(item):
    drawn = numbers.draw(item, 0)
    assert judge.number(drawn, f"{drawn.answer!r} apples").status == "again"
    assert judge.number(drawn, f"{drawn.answer * 1.61 + 0.7!r} {item.unit}").status == "wrong"


# code


@of(Code)
def test_the_reference_passes_the_hidden_tests_and_the_starter_is_not_attempted(item):
    drill, reference = exercises.get(item.exercise), links.find(item.reference)
    assert drill.name == reference.__name__ and re.search(rf"^(def|class) {drill.name}\b", item.starter, re.MULTILINE)
    source = inspect.getsource(importlib.import_module(reference.__module__))
    for seed in SEEDS:
        assert child.code(drill, source, seed)[0] == "ok"
    assert child.code(drill, item.starter, 0)[0] == "not attempted"
    assert judge.code(item, item.starter).status == "not attempted"


@of(Code)
def test_the_starter_has_the_references_parameters(item):
    drill = exercises.get(item.exercise)
    namespace = {"__name__": "starter"}
    exec("import torch\nfrom torch import Tensor, nn\n" + item.starter, namespace)  # noqa: S102 (our own)
    assert list(inspect.signature(namespace[drill.name]).parameters) == list(
        inspect.signature(links.find(item.reference)).parameters
    )


@of(Code)
def test_every_typical_mistake_gets_its_own_hint(item):
    drill = exercises.get(item.exercise)
    assert len({wrong.hint for wrong in drill.wrong}) == len(drill.wrong) >= 3
    for wrong in drill.wrong:
        for seed in SEEDS:
            verdict = checks.judge(drill, wrong.answer, seed)
            assert (verdict.status, verdict.text) == ("wrong", wrong.hint), f"{wrong.name}, seed {seed}"


# bugs


@of(Bug)
def test_the_detector_catches_the_bug_and_passes_the_fix(item):
    status, sentence = child.bug(item.snippet, detector(item))
    assert status == "wrong" and len(sentence) > 10, sentence
    assert child.bug(judge.repaired(item, item.line, item.fix), detector(item)) == ("ok", "")


@of(Bug)
def test_wrong_fixes_are_caught_and_have_their_own_hints(item):
    assert len({wrong.hint for wrong in item.wrong_fixes}) == len(item.wrong_fixes) >= 2
    for wrong in item.wrong_fixes:
        assert not judge.same_code(wrong.line_text, item.fix)
        status, sentence = child.bug(judge.repaired(item, item.line, wrong.line_text), detector(item))
        assert status == "wrong", f"{wrong.line_text!r}: {sentence}"


def test_a_repair_passes_in_the_real_process_too():
    item = next(item for item in ITEMS if isinstance(item, Bug))
    verdict = judge.bug(item, item.line, item.fix + "  # mine")
    assert (verdict.status, verdict.text, verdict.score) == ("ok", item.explain, 1.0)
