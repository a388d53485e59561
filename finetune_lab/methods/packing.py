"""Rows of different lengths in one batch: padding, or packing without contamination.

What: pad on either side; derive position ids; choose which samples share a row; attention that none sees another.
Papers: Krell et al. 2021, Efficient Sequence Packing without Cross-contamination (arXiv 2107.02027);
Ding et al. 2024, Fewer Truncations Improve Language Modeling (arXiv 2404.10830): best fit decreasing, no sample cut.
Formula: token i may attend to token j if j <= i and both belong to the same sample: sum of length^2, not length of row^2.
Leaves out: cutting samples that are too long, variable-length attention kernels (flash attention, GPU).
In production: `trl.SFTConfig(packing=True)` or `padding_free=True`, `transformers.DataCollatorWithFlattening`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which samples share a row: lists of indices, no row longer than `capacity`, every sample whole and once.

    Best fit decreasing: the longest sample first, each into the row with the least room that still takes it, else into
    a new row. Bit s of `rooms` says that some row has room s; the lowest bit from the sample's length on is the best
    fit. Rows come out sorted by their longest sample: shuffle them before training.
    Raises ValueError for a sample that is empty or longer than a row. Source: `trl.pack_dataset(strategy="bfd")`,
    which packs each 1,000 samples apart and cuts the long ones.
    """
    bad = [i for i, length in enumerate(lengths) if not 0 < length <= capacity]
    if bad:
        raise ValueError(
            f"{len(bad)} samples do not fit into a row of {capacity} tokens, the first is sample {bad[0]} with "
            f"{lengths[bad[0]]} tokens: expected 1 to {capacity}; cut or drop them first"
        )
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(capacity)]
    rooms = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        if room > length:
            rows_with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


def token_efficiency(lengths: Sequence[int], rows: Sequence[Sequence[int]], width: int | None = None) -> float:
    """Real tokens / computed tokens. width: of every row; None = rows are batches, each padded to its longest sample."""
    slots = sum(width or len(row) * max(lengths[i] for i in row) for row in rows)
    return sum(lengths[i] for row in rows for i in row) / slots


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention inside each sample of packed rows, and no score computed between samples.

    query: (batch, heads, seq, head_dim); key, value: (batch, kv_heads, seq, head_dim); position_ids: (batch, seq),
    restarting at 0 with every sample. Returns (batch, heads, seq, head_dim), equal to attention under
    `block_diagonal_mask(position_ids)`, in sum(length^2) instead of seq^2 steps.
    """
    rows = []
    for row, positions in enumerate(position_ids.expand(query.shape[0], -1)):
        starts = (positions == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]
        samples = zip(*(part[row : row + 1].split(lengths, dim=2) for part in (query, key, value)), strict=True)
        done = [
            scaled_dot_product_attention(*qkv, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=True)
            for qkv in samples
        ]
        rows.append(torch.cat(done, dim=2))
    return torch.cat(rows)
