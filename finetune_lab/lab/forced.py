"""Exact match without generating: one forward pass over the reference answers tells what greedy decoding would write.

Why it is the same: greedy decoding writes the reference if and only if, with the reference so far in front of it, the
model's best token is the reference's next one, at every position up to the end of the turn. So a batch of whole
answers, one pass, and a comparison of arg-maxes do what dozens of decoding steps do, several times faster; the loss
comes out of the same logits.
Leaves out: answers that are right in other words or tokens, sampling, partial credit. The generated text itself is in
`lab.generate`; where the answer may be worded freely, use that.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_lab.methods.loss import shift

from .train import collate, encode


@torch.no_grad()
def scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict], batch_size: int = 64
) -> dict[str, float]:
    """`exact_match`, the share of items whose greedy answer is the reference, and `loss`, nats a token of the answers.

    items: prompt-completion rows. The model is set to evaluation for the pass and put back. Raises UserError as `encode`.
    """
    rows = sorted(encode(tokenizer, items), key=lambda row: len(row[0]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    training, total, tokens, right = model.training, 0.0, 0, 0
    model.eval()
    for first in range(0, len(rows), batch_size):
        batch = {key: value.to(model.device) for key, value in collate(rows[first : first + batch_size], pad).items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logits, labels = shift(logits, batch["labels"])
        counted = labels != -100
        total += F.cross_entropy(logits[counted].float(), labels[counted], reduction="sum").item()
        tokens += int(counted.sum())
        right += int(((logits.argmax(-1) == labels) | ~counted).all(dim=1).sum())
    model.train(training)
    return {"exact_match": right / max(len(rows), 1), "loss": total / max(tokens, 1)}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight by its name, tied ones once: what merging works on."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Write `weights` (as `weights_of` gives them, all of them) into the model, in place; returns the model."""
    for name, p in model.named_parameters():
        p.copy_(weights[name])
    return model
