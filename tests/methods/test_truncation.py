"""What a maximum length cuts off is counted row by row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_lab.methods.truncation import cut_report, needed_length

ANSWER = [-100, -100, -100, 5, 6, 7]


@pytest.mark.parametrize(
    ("limit", "kind"), [(6, "whole"), (9, "whole"), (5, "cut"), (4, "cut"), (3, "empty"), (1, "empty")]
)
def test_a_row_is_whole_cut_or_empty(limit, kind):
    assert cut_report([ANSWER], limit) == {"whole": 0, "cut": 0, "empty": 0} | {kind: 1}


def test_losing_masked_tokens_only_leaves_a_row_whole():
    assert cut_report([[-100, 5, -100, -100]], 2)["whole"] == 1


def test_a_first_label_alone_is_no_label():
    assert cut_report([[5, -100, -100]], 3)["empty"] == 1


rows = st.lists(st.lists(st.sampled_from([-100, 1, 2]), min_size=1, max_size=9), max_size=9)


@given(rows, st.integers(1, 9))
def test_every_row_is_counted_once_and_a_longer_limit_never_empties_one(labels, limit):
    now, longer = cut_report(labels, limit), cut_report(labels, limit + 1)
    assert sum(now.values()) == len(labels)
    assert longer["empty"] <= now["empty"] and longer["whole"] >= now["whole"]


@given(st.lists(st.integers(1, 99), min_size=1, max_size=30), st.floats(0.01, 1))
def test_the_needed_length_is_the_smallest_that_keeps_the_share(lengths, share):
    length = needed_length(lengths, share)
    kept = [sum(n <= limit for n in lengths) for limit in (length, length - 1)]
    assert kept[0] >= share * len(lengths) - 1e-9 and kept[1] < share * len(lengths)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, 99])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        needed_length([1, 2], share)
