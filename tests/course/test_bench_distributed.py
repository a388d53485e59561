"""The rows of bench `distributed` say what two processes kept and how far their curve is from that of one."""

import pytest

from finetune_lab.course.bench import distributed, holds

WHOLE = {"weights": 100, "gradients": 100, "moments": 200}
HALF = {"weights": 50, "gradients": 50, "moments": 100}
ALONE = {"mode": "one", "loss": [2.0, 1.0], "bytes": [WHOLE]}


def rows(**changes) -> dict[str, dict]:
    result = {"mode": "fsdp2", "loss": [2.0, 1.0], "bytes": [HALF, HALF], **changes}
    return {row["name"]: row for row in distributed.rows_of(ALONE, [result])}


def test_halves_and_an_equal_curve_hold():
    found = rows()
    assert len(found) == 4 and all(holds(row) for row in found.values())
    assert found["fsdp2: moments that a process keeps"]["ratio"] == 0.5


def test_the_process_that_keeps_most_is_the_one_that_counts():
    row = rows(bytes=[HALF, WHOLE])["fsdp2: weights that a process keeps"]
    assert row["value"] == 100 and not holds(row)


def test_a_curve_that_drifts_is_seen():
    row = rows(loss=[2.0, 1.01])["fsdp2: largest relative difference of the loss"]
    assert row["value"] == pytest.approx(0.01) and not holds(row)
