"""The bench of packing compares the same documents, and its figures say what the lesson says."""

import pytest

from finetune_lab.course.bench import holds, packing

TINY = {"documents": 300, "draws": 1, "step documents": 9, "layers": 1, "goals": (">= 0.98", ">= 1", ">= 1")}


def test_every_contestant_trains_on_the_same_tokens_and_reaches_the_same_loss():
    losses = {name: step() for name, step in packing.steps_of(TINY, vocab=64).items()}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["padded"]), rel=1e-5)


def test_packing_fills_rows_that_padding_leaves_half_empty_and_only_wrapped_cuts():
    found = packing.plans(packing.lengths_of(300, seed=0), seed=0)
    assert found["padded, random batches"][0] < 0.5 < found["padded, grouped by length"][0] < found["TRL bfd"][0]
    assert found["ours, best fit"][0] >= found["TRL bfd"][0]
    assert [name for name, (_, cut) in found.items() if cut] == ["TRL wrapped"]


def test_trl_packs_each_thousand_documents_apart_and_loses_by_it():
    lengths = packing.lengths_of(2500, seed=0)
    rows = [len(packing.best_fit(lengths, packing.WIDTH)), len(packing.trl_rows(lengths, "bfd"))]
    assert rows[0] < rows[1]


def test_only_position_ids_without_a_mask_keep_samples_apart():
    rows = packing.isolation_rows()
    assert len(rows) == 6 and all(holds(row) for row in rows)


def test_every_row_of_the_efficiency_table_has_its_own_name():
    names = [row["name"] for row in packing.efficiency_rows(TINY)]
    assert len(set(names)) == len(names) == 8
