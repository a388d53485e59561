"""Rows of different lengths in one batch: padding, or packing without contamination.

What: pad on either side; derive position ids; put several samples into one row so that none sees another.
Papers: Krell et al. 2021, Efficient Sequence Packing without Cross-contamination (arXiv 2107.02027).
Formula: token i may attend to token j if j <= i and both belong to the same sample.
Leaves out: choosing which samples share a row (best fit decreasing), variable-length attention kernels.
In production: `trl.SFTConfig(packing=True)` or `padding_free=True`, `transformers.DataCollatorWithFlattening`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100


def pad_rows(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad lists of ids to the longest. Returns (batch, seq) ids and the attention mask (1 = real token).

    The mask is made by position, never by comparing ids with `value`: a real token may have the same id.
    Labels are padded by the same function with value=-100. Raises ValueError for an unknown side.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}, expected 'left' or 'right'")
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place] = torch.tensor(row, dtype=ids.dtype)
        mask[i, place] = 1
    return ids, mask


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Position ids (batch, seq) that count real tokens only: left padding then changes nothing.

    Padding gets position 0; its output is never used. Source: transformers' generation, `cumsum(mask) - 1`.
    """
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def pack(rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Join samples into one row. Returns ids, labels and position ids, each (1, total length).

    Positions restart at 0 with every sample, and the first label of every sample is -100: the token in front of it
    belongs to another sample, so it must not be asked to predict it.
    """
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed_labels = torch.tensor([[label for row in labels for label in row]])
    return ids, packed_labels.masked_fill(positions == 0, IGNORE_INDEX), positions


def block_diagonal_mask(position_ids: Tensor) -> Tensor:
    """Who may attend to whom in packed rows: bool (batch, 1, seq, seq), True = allowed.

    position_ids: (batch, seq), restarting at 0 with every sample. The extra dimension is the heads' one, as
    `scaled_dot_product_attention` and transformers' 4-D `attention_mask` expect it.
    """
    sample = (position_ids == 0).cumsum(1)
    same = sample[:, :, None] == sample[:, None, :]
    length = position_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    return (same & causal)[:, None]
