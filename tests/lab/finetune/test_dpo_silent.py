"""Each silent failure of preference training is found where it is, and not found where it is not."""

import pytest

from finetune_lab.lab.finetune import silent, silent_pairs
from finetune_lab.lab.finetune.encode import Example
from finetune_lab.lab.finetune.pairs import Pair, Rated


def answer(length, token=5):
    return Example([1, 2] + [token] * length, [-100, -100] + [token] * length)


def pair(chosen, rejected, tokens=(5, 6)):
    return Pair(answer(chosen, tokens[0]), answer(rejected, tokens[1]))


def row(chosen, rejected, prompt="Where is my lamp?"):
    turns = {"prompt": ("user", prompt), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    return {key: [{"role": role, "content": text}] for key, (role, text) in turns.items()}


def test_two_answers_that_become_the_same_tokens_are_found():
    assert silent_pairs.same_answer([pair(3, 3)]) is None
    found = silent_pairs.same_answer([pair(3, 3), pair(3, 3, (5, 5))])
    assert found.level == "warning" and "1 of 2" in found.found and "rows 2" in found.found
    assert silent_pairs.same_answer([pair(3, 3, (5, 5))]).level == "error"


@pytest.mark.parametrize(
    ("sizes", "word"),
    [([(9, 3)] * 12, "longer"), ([(3, 9)] * 12, "shorter"), ([(9, 3), (3, 9)] * 6, None), ([(9, 3)] * 9, None)],
)
def test_length_that_decides_is_found_in_both_directions_and_not_in_a_handful(sizes, word):
    found = silent_pairs.length_decides([pair(*size) for size in sizes])
    assert (found is None) if word is None else f"is the {word} one in 100%" in found.found


def test_answers_of_equal_length_have_no_length_bias():
    assert silent_pairs.length_decides([pair(4, 4)] * 20) is None


def test_a_pair_and_its_opposite_are_found():
    assert silent_pairs.both_ways([row("Yes.", "No."), row("Yes.", "Maybe.")]) is None
    found = silent_pairs.both_ways([row("Yes.", "No."), row("It is.", "No."), row("No.", "Yes.")])
    assert "1 of 3" in found.found and "rows 3" in found.found


def test_the_same_answers_to_another_prompt_are_no_contradiction():
    assert silent_pairs.both_ways([row("Yes.", "No."), row("No.", "Yes.", prompt="Is it lost?")]) is None


def test_a_prompt_inside_every_answer_is_found():
    assert silent_pairs.prompt_in_answers([row("On its way.", "No.")] * 5) is None
    asked = "Where is my lamp?"
    assert silent_pairs.prompt_in_answers([row(f"{asked} On its way.", "No.", asked)]) is None
    assert silent_pairs.prompt_in_answers([row(f"{asked} On its way.", f"{asked} No.", asked)]) is not None


@pytest.mark.parametrize(
    ("good", "bad", "weights", "level"),
    [
        (4, 4, (1, 1), None),
        (4, 3, (1, 1), None),
        (8, 2, (1, 1), "warning"),
        (8, 2, (1, 4), None),
        (3, 9, (3, 1), None),
        (5, 0, (1, 1), "error"),
        (0, 5, (1, 1), "error"),
    ],
)
def test_labels_must_be_of_both_kinds_and_in_balance(good, bad, weights, level):
    rated = [Rated([1, 2], [-100, 2], good=i < good) for i in range(good + bad)]
    found = silent_pairs.one_kind_of_label(rated, *weights)
    assert (found and found.level) == level


def test_the_weight_that_is_advised_brings_balance():
    rated = [Rated([1, 2], [-100, 2], good=i < 8) for i in range(10)]
    assert "undesirable_weight: 4," in silent_pairs.one_kind_of_label(rated, 1, 1).fix
    assert silent_pairs.one_kind_of_label(rated, 1, 4) is None


def test_a_bare_base_model_without_a_start_is_said():
    assert silent_pairs.no_start(None, "tiny") is not None
    assert silent_pairs.no_start("runs/letters", "tiny") is None
    assert silent_pairs.no_start(None, "Qwen/Qwen3-0.6B") is None


@pytest.mark.parametrize(("lr", "word"), [(1e-6, "low"), (1e-4, None), (2e-3, "high")])
def test_a_rate_of_supervised_fine_tuning_is_high_for_preferences(lr, word):
    found = silent.rate_out_of_range("lora", lr, 2.6e6, "dpo-start")
    assert (found is None) if word is None else word in found.found


def test_repeated_rows_are_counted():
    assert silent.repeated(["a", "b"]) is None
    found = silent.repeated(["a", "b", "b", "b"])
    assert "2 of 4" in found.found and "row 2 stands there 3 times" in found.found


@pytest.mark.parametrize(
    ("rows", "says"), [(0, None), (50, None), (20, "28 to 72 %"), (4, "1 to 99 %"), (2, "0 to 100 %")]
)
def test_a_score_of_few_rows_has_its_interval(rows, says):
    found = silent.few_scored(rows)
    assert (found is None) if says is None else says in found.found
