"""One row for a pair: prompt, chosen answer, rejected answer. The prompt is computed once instead of twice.

What: ids, positions and the attention that makes one row of P + C + R tokens equal to two rows of P + C and P + R.
Formula: token i may see token j if j <= i, unless i is of the rejected answer and j of the chosen one. The rejected
answer takes up the positions behind the prompt again, so its tokens cannot know that another answer stands between.
Same idea as the prefix trees of inference servers and as `methods.packing`: a mask decides what a row means.
Leaves out: kernels that skip the empty blocks. In production: TRL computes the prompt twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedRows:
    """A batch of pairs, one row each, and where their answers are predicted.

    ids, positions: (batch, seq); allowed: bool (batch, 1, seq, seq), True where a token may look.
    places: (n,) index into the (batch * seq) states, of the state that predicts each answer token; targets: (n,) its id.
    answers: (n,) which answer it belongs to: 0 .. batch-1 the chosen ones, batch .. 2 batch-1 the rejected ones.
    """

    ids: Tensor
    positions: Tensor
    allowed: Tensor
    places: Tensor
    targets: Tensor
    answers: Tensor

    def to(self, device: torch.device | str) -> "SharedRows":
        """The same rows on another device."""
        return SharedRows(*(getattr(self, field.name).to(device) for field in fields(self)))


def shared_rows(
    prompts: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]], pad: int
) -> SharedRows:
    """Build the rows from token ids: prompts, and the answers without their prompt, end of turn included.

    Raises ValueError for an empty prompt: nothing would predict the first token of an answer.
    """
    batch = len(prompts)
    width = max(len(p) + len(c) + len(r) for p, c, r in zip(prompts, chosen, rejected, strict=True))
    ids = torch.full((batch, width), pad)
    positions = torch.arange(width).repeat(batch, 1)
    allowed = torch.ones(width, width, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    places, targets, answers = [], [], []
    for b, (p, c, r) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        if not p:
            raise ValueError(f"row {b} has an empty prompt: the first token of its answers has nothing to come from")
        first, second, end = len(p), len(p) + len(c), len(p) + len(c) + len(r)
        ids[b, :end] = torch.tensor([*p, *c, *r])
        positions[b, second:end] -= len(c)
        allowed[b, 0, second:end, first:second] = False
        before = [first - 1, *range(first, second - 1)], [first - 1, *range(second, end - 1)]
        for which, answer, states in ((b, c, before[0]), (batch + b, r, before[1])):
            places += [b * width + s for s in states[: len(answer)]]
            targets += answer
            answers += [which] * len(answer)
    return SharedRows(ids, positions, allowed, *(torch.tensor(x) for x in (places, targets, answers)))
