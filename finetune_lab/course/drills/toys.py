"""The small things that the bug drills train: a one-layer language model, a layer with a head, a tokenizer.

They behave as transformers' do where a bug hides: the model shifts labels itself, takes `attention_mask` and
`position_ids`, and the tokenizer adds a start token unless told not to. Everything runs in milliseconds.
Leaves out: generation, saving, everything that no drill asks for.
"""

import re
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from finetune_lab.methods.loss import sft_loss
from finetune_lab.methods.packing import block_diagonal_mask


def step(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One update; returns the loss as a number."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class TinyLM(nn.Module):
    """One layer of attention over relative distances (so that left padding alone changes nothing, as with RoPE)."""

    def __init__(self, vocab: int = 12, width: int = 24, dropout: float = 0.0, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.mix = nn.Embedding(vocab, width), nn.Linear(width, 3 * width, bias=False)
            self.distance = nn.Parameter(0.5 * torch.randn(64))
            self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor, labels=None, attention_mask=None, position_ids=None, num_items_in_batch=None):
        """ids, labels, masks, positions: (batch, seq). Returns `.logits` (batch, seq, vocab) and `.loss`.

        Labels are shifted here. Without an attention mask, position ids that restart at 0 separate packed samples.
        """
        places = torch.arange(ids.shape[1])
        gap = (places[:, None] - places).clamp(min=0)
        allowed = (places[:, None] >= places).expand(len(ids), -1, -1)
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None, :] | torch.eye(len(places), dtype=torch.bool)
        elif position_ids is not None:
            allowed = block_diagonal_mask(position_ids)[:, 0]
        x = self.embed(ids)
        q, k, v = self.mix(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + self.distance[gap]
        mixed = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
        logits = self.head(self.dropout(x + mixed))
        loss = None if labels is None else sft_loss(logits, labels, num_items_in_batch)
        return SimpleNamespace(logits=logits, loss=loss)


class LoRA(nn.Module):
    """A frozen linear layer and its low-rank update, B zero at the start."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class Regressor(nn.Module):
    """A layer to adapt and a head that trains beside it."""

    def __init__(self, inputs: int = 6, width: int = 9, outputs: int = 3):
        super().__init__()
        self.layer, self.head = nn.Linear(inputs, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh())


def add_lora(model: Regressor) -> None:
    """Freeze `model.layer` and put an adapter around it, as `peft.get_peft_model` does; the head stays trainable."""
    model.layer = LoRA(model.layer)


class Tokenizer:
    """One id a letter or special token. `encode` adds the start token by default, as Llama's tokenizers do."""

    tokens = ("<bos>", "<user>", "<assistant>", "<end>", *"abcdefghijklmnopqrstuvwxyz")
    bos_token_id = 0

    def apply_chat_template(self, messages: list[dict], tokenize: bool = False) -> str:
        """The conversation as text, which starts with `<bos>`."""
        return "<bos>" + "".join(f"<{m['role']}>{m['content']}<end>" for m in messages)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [self.tokens.index(token) for token in re.findall(r"<\w+>|[a-z]", text)]
        return [self.bos_token_id, *ids] if add_special_tokens else ids
