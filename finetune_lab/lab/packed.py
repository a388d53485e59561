"""Packed rows on a real model: transformers' attention replaced by attention inside each document.

What transformers does by itself: with position ids, no mask and no cache it builds a dense block-diagonal mask, and
computes every score of a row to throw most of them away. `use_document_attention(model)` computes the others only.
Source: `transformers.AttentionInterface.register`; the attention itself is `methods.packing.document_attention`.
Production: flash attention's variable-length kernel (`attn_implementation="flash_attention_2"`, GPU).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from finetune_lab.errors import UserError
from finetune_lab.methods.packing import document_attention, pack

NAME = "finetune_lab_documents"


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """The signature that transformers calls. query: (batch, heads, seq, head_dim); returns (batch, seq, heads, head_dim)."""
    if position_ids is None or key.shape[2] != query.shape[2]:
        raise UserError("document attention needs position_ids and no cache: call model(..., use_cache=False)")
    out = document_attention(query, key, value, position_ids, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


def use_document_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switch `model` to document attention; returns it. Rows must start at position 0 and have no left padding.

    `model.set_attn_implementation("sdpa")` switches back. No attention mask is looked at: give packed rows only.
    """
    AttentionInterface.register(NAME, attention_forward)
    model.set_attn_implementation(NAME)
    return model


def packed_batches(rows: Sequence[tuple[list, list]], groups: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
    """One batch of one packed row for each group of indices: input_ids, labels, position_ids, each (1, tokens).

    rows: `(ids, labels)` of each sample, as `lab.train.encode` makes them; groups: from `methods.packing.best_fit`.
    """
    batches = []
    for group in groups:
        ids, labels, positions = pack([rows[i][0] for i in group], [rows[i][1] for i in group])
        batches.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return batches
