"""The shop's old letters: where a policy with bad habits comes from, and the rule that judges what it writes.

A model fine-tuned on a mixture of good and bad replies of the task `reply` writes both, as the shop did. Preference
training has something to heal there. The judge is `tasks.reply_faults`, a stated rule: no taste, no second model.
"""

import random
from collections.abc import Sequence

from . import tasks

KINDS = {"not courteous": "rude", "not concise": "long", "invented": "invented", "no answer": "no answer"}


def old_letters(items: Sequence[dict], good: float = 0.5, seed: int = 0) -> list[dict]:
    """Prompt-completion items of `reply`; a share `good` of them keeps its good reply, the others take the bad one."""
    rng = random.Random(seed)
    return [
        {"prompt": item["prompt"], "completion": item["completion" if rng.random() < good else "rejected"]}
        for item in items
    ]


def good_share(replies: Sequence[Sequence[str]], items: Sequence[dict]) -> float:
    """Share of replies without a fault; `replies` holds several to each item."""
    said = [tasks.reply_faults(reply, item["facts"]) for group, item in _groups(replies, items) for reply in group]
    return sum(not faults for faults in said) / len(said)


def win_rate(replies: Sequence[Sequence[str]], others: Sequence[Sequence[str]], items: Sequence[dict]) -> float:
    """Share of comparisons won: fewer faults wins, a tie is one half; every reply against every other to the same item."""
    total = count = 0
    for (group, item), other in zip(_groups(replies, items), others, strict=True):
        ours, theirs = ([len(tasks.reply_faults(reply, item["facts"])) for reply in said] for said in (group, other))
        total += sum((a < b) + 0.5 * (a == b) for a in ours for b in theirs)
        count += len(ours) * len(theirs)
    return total / count


def fault_shares(replies: Sequence[Sequence[str]], items: Sequence[dict]) -> dict[str, float]:
    """Share of replies with each kind of fault: rude, long, invented, no answer. A reply may have several."""
    found = [
        {KINDS[fault.split(":")[0]] for fault in tasks.reply_faults(reply, item["facts"])}
        for group, item in _groups(replies, items)
        for reply in group
    ]
    return {kind: sum(kind in kinds for kinds in found) / len(found) for kind in KINDS.values()}


def _groups(replies: Sequence[Sequence[str]], items: Sequence[dict]):
    return zip(replies, items, strict=True)
