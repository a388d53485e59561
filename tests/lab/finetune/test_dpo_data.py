"""Claims about the data of preference training: formats, what is shown of them, what stops a run before it starts."""

import logging

import pytest

from finetune_lab.errors import UserError
from finetune_lab.lab.data import DataError, load_jsonl
from finetune_lab.lab.finetune import pairs, preflight, preflight_dpo
from finetune_lab.lab.finetune.dpo_recipe import DpoRecipe


def pair(n, chosen="It is on its way.", rejected="No."):
    return {"prompt": f"Where is lamp {n}?", "chosen": chosen, "rejected": rejected}


def thumb(n, label):
    return {"prompt": f"Where is lamp {n}?", "completion": "It is on its way.", "label": label}


@pytest.fixture
def look(jsonl):
    """`look(*rows, beta=...)`: the preflight of a recipe on these rows."""
    return lambda *rows, **more: preflight_dpo.inspect(DpoRecipe(data=jsonl("own.jsonl", *rows), **more))


def names(found):
    return {finding.name for finding in found.findings}


def test_the_loss_follows_the_format(look):
    assert look(pair(1)).recipe.loss == "sigmoid"
    assert look(thumb(1, True), thumb(2, False)).recipe.loss == "kto"


def test_a_loss_on_pairs_refuses_single_answers(look):
    with pytest.raises(UserError, match="loss ipo compares two answers, but the rows are single ones"):
        look(thumb(1, True), thumb(2, False), loss="ipo")


def test_a_weight_of_kto_is_refused_once_the_data_has_chosen_another_loss(look):
    with pytest.raises(UserError, match="desirable_weight does nothing in loss sigmoid"):
        look(pair(1), desirable_weight=2)


def test_pairs_with_kto_become_a_good_and_a_bad_answer_each(look):
    found = look(*map(pair, range(6)), loss="kto")
    assert sorted(row["label"] for row in found.rows.train) == [False] * 6 + [True] * 6
    assert len(found.train) == 12


def test_kto_never_puts_all_good_answers_first():
    order = [row["label"] for row in pairs.as_rated([pair(n) for n in range(20)], seed=0)]
    assert order != sorted(order) and order != sorted(order, reverse=True)
    assert order == [row["label"] for row in pairs.as_rated([pair(n) for n in range(20)], seed=0)]


def test_kto_needs_more_than_one_row_in_a_batch(look):
    with pytest.raises(UserError, match="batch_size is 1: kto estimates its reference point"):
        look(thumb(1, True), thumb(2, False), batch_size=1)


@pytest.mark.parametrize("label", [1, "yes", None])
def test_a_label_is_true_or_false_and_nothing_else(jsonl, label):
    with pytest.raises(DataError, match="expected true for a good answer, false for a bad one"):
        load_jsonl(jsonl("own.jsonl", thumb(1, label)))


def test_every_bad_pair_is_named(look):
    with pytest.raises(DataError) as error:
        look(pair(1), pair(2, "No.", "No."), {"prompt": "?", "chosen": "a"}, pair(3, rejected=""))
    assert [problem.line for problem in error.value.problems] == [2, 3, 4]


def test_supervised_rows_are_refused_with_what_is_needed(look):
    with pytest.raises(UserError, match="`dpo` needs preference or unpaired data"):
        look({"prompt": "a", "completion": "b"})


def test_the_preview_shows_which_answer_is_called_the_better_one(look):
    (shown,) = look(pair(1)).previews
    assert shown.endswith("<|assistant|>\n  chosen:   [[It is on its way.<|end|>]]\n  rejected: [[No.<|end|>]]")
    assert look(thumb(1, True), thumb(2, False)).previews[0].endswith("\n  label: good")


def test_a_pair_whose_prompt_fills_max_length_is_left_out_and_named(look):
    found = look(pair("lamp " * 30), pair(1), max_length=24)
    assert len(found.rows.train) == len(found.train) == 1 and "no labelled token" in names(found)


def test_answers_that_part_behind_max_length_are_the_same(look):
    found = look(pair(1, "lamp " * 20 + "a", "lamp " * 20 + "b"), max_length=24)
    assert [f.name for f in found.findings if f.level == "error"] == ["same answer twice"]


def test_lengths_count_both_answers_and_the_longest_is_one_sequence(look):
    found = look(pair(1))
    e = found.train[0]
    assert found.lengths()["tokens"] == len(e.chosen.ids) + len(e.rejected.ids)
    assert found.lengths()["longest"] == len(e.chosen.ids)


def test_median_and_longest_count_the_same_thing(look):
    for loss in ("sigmoid", "kto"):
        sizes = look(*map(pair, range(4)), loss=loss).lengths()
        assert sizes["median"] <= sizes["longest"]


def test_pairs_trained_with_kto_are_called_single_answers(look):
    assert look(*map(pair, range(4)), loss="kto").as_dict()["kind"] == "unpaired"
    assert look(*map(pair, range(4))).as_dict()["kind"] == "preference"


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_contradiction_is_found_with_its_line_wherever_the_split_puts_it(look, loss):
    rows = [*map(pair, range(8)), pair(3, "No.", "It is on its way.")]
    for seed in range(4):
        found = look(*rows, loss=loss, hold_out=0.3, seed=seed)
        assert any("1 of 9 pairs say the opposite of an earlier pair (lines 9)" in f.found for f in found.findings)


def test_findings_after_the_split_name_the_line_of_the_file(look):
    rows = [*map(pair, range(8)), pair("lamp " * 30)]
    seen = []
    for seed in range(6):
        found = look(*rows, max_length=24, hold_out=0.3, seed=seed)
        seen += [f.found for f in found.findings if f.name == "no labelled token"]
    assert seen and all("(lines 9)" in text for text in seen)


def test_kto_names_the_line_of_a_shuffled_pair(look):
    (said,) = [f.found for f in look(*map(pair, range(8)), pair("lamp " * 30), max_length=24, loss="kto").findings
               if f.name == "no labelled token"]  # fmt: skip
    assert "2 of 18 rows" in said and "(lines 9)" in said


def test_an_answer_labelled_both_ways_is_found_and_no_weight_is_advised(look):
    found = look(*(thumb(n, False) for n in range(5)), thumb(0, True))
    (said,) = [f.found for f in found.findings if f.name == "labelled both ways"]
    assert "2 of 6 rows" in said and "lines 1, 6" in said and "labels out of balance" not in names(found)
    found = look(*(thumb(n, False) for n in range(5)), thumb(9, True))
    assert "labels out of balance" in names(found) and "labelled both ways" not in names(found)


def test_a_row_that_is_left_out_shapes_nothing_and_no_library_speaks(look, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    alone, beside = look(pair(1)), look(pair(1), pair("lamp " * 400))
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert beside.memory["bytes"] == alone.memory["bytes"]
    assert "longer than" not in caplog.text


def test_memory_counts_two_sequences_for_a_pair_and_one_for_a_thumb(look):
    rows = [pair(n) for n in range(4)]
    dpo, kto = (look(*rows, loss=loss, batch_size=8).memory["bytes"] for loss in ("sigmoid", "kto"))
    assert kto < dpo


def test_the_course_of_pairs_is_scored_on_combinations_that_training_never_shows():
    found = preflight_dpo.inspect(DpoRecipe(task="reply", items=40, test_items=20))
    assert "0 of them share" in found.rows.notes[0] and found.valid_rows[0]["facts"]["order"]
    assert names(found) == {"no start", "few scored rows"}


def test_the_text_of_the_preflight_names_the_loss(look):
    text = "\n".join(preflight.lines(look(*map(pair, range(12)), hold_out=0.2)))
    assert "count in the loss (sigmoid)" in text and "the chosen answer is the longer one in 100%" in text
