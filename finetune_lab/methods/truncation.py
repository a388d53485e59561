"""What a maximum length cuts off: count it before training, as no trainer does it for you.

A row that is cut inside its answer teaches the model to stop anywhere (its end-of-turn label is gone); one that keeps no
label teaches nothing, and a batch of such rows has the loss 0/0. The end of the row is cut, as in TRL's `keep_start`.
Leaves out: cutting at the left (TRL's `keep_end`: it takes the prompt instead), splitting long rows in two.
In production: `trl.SFTConfig(max_length=...)`, which drops rows without a label and says nothing about the others.
"""

import math
from collections.abc import Sequence

IGNORE_INDEX = -100


def cut_report(rows: Sequence[Sequence[int]], max_length: int) -> dict[str, int]:
    """How many rows of labels stay "whole", lose labelled tokens ("cut"), or keep none that counts ("empty").

    The first label of a row never counts: no token stands in front of it. A row that loses only masked tokens is whole.
    """
    report = {"whole": 0, "cut": 0, "empty": 0}
    for labels in rows:
        kept = sum(label != IGNORE_INDEX for label in labels[1:max_length])
        lost = sum(label != IGNORE_INDEX for label in labels[1:]) - kept
        report["empty" if not kept else "cut" if lost else "whole"] += 1
    return report


def needed_length(lengths: Sequence[int], share: float) -> int:
    """The smallest max_length at which at least `share` (above 0, at most 1) of the rows stay whole.

    Raises ValueError for another share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: give a number above 0 and at most 1, 0.99 for 99 %")
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1]
