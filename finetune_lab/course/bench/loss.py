"""Bench `loss`: score only the positions that count, against full logits and against TRL's fused head, on the CPU.

All three run on one Llama head: same hidden states, same labels, same loss and gradient (checked, as rows).
"full logits" is transformers' own `model(..., labels=...)`; "trl" is `trl.trainer.utils.add_fused_lm_head`.
The backbone has no layers, so that time and memory are those of the head and the loss.
TRL's head compacts to the labelled positions on GPUs with Triton only: the ratios to it hold for CPUs.
"""

from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetune_lab.lab.meter import interleaved_seconds, median_ratio, one_thread, peak_bytes
from finetune_lab.methods.loss import chunked_loss, labelled_only_loss

NAME = "loss"
HELP = "loss at labelled positions only: speed and memory against full logits and TRL's fused head"

LABELLED = 0.25  # share of the positions that count
# goals of the chunked loss: times faster than full logits, than TRL's head; share of full logits' extra memory
FULL = {"seq": 1024, "width": 576, "vocabs": (49_152, 151_936), "rounds": 3,
        "goals": (">= 4", ">= 10", "<= 0.1")}  # fmt: skip
QUICK = {"seq": 256, "width": 192, "vocabs": (8_192,), "rounds": 15,  # a small head gains less
         "goals": (">= 1.5", ">= 3", "<= 0.25")}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREE = {"fp32": "<= 1e-05", "bf16": "<= 0.02"}  # bf16: the peers round logits and gradients to 8 bits of mantissa


def head_model(vocab: int, width: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama without layers: final norm and output head, frozen; seeded by the caller."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=0, num_attention_heads=1, tie_word_embeddings=True
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def case(vocab: int, width: int, seq: int, dtype: torch.dtype) -> tuple[LlamaForCausalLM, Tensor, Tensor]:
    """Model, hidden states (1, seq, width) that want a gradient, and labels (1, seq) with LABELLED of them counted."""
    torch.manual_seed(0)
    model = head_model(vocab, width, dtype)
    hidden = torch.randn(1, seq, width).to(dtype).requires_grad_()
    labels = torch.full((1, seq), -100)
    places = 1 + torch.randperm(seq - 1)[: int(LABELLED * seq)]
    labels[0, places] = torch.randint(vocab, (len(places),))
    return model, hidden, labels


def contestants(model: LlamaForCausalLM, hidden: Tensor, labels: Tensor) -> dict[str, object]:
    """Name -> a function that computes the loss and the gradient of `hidden`, and returns the loss."""
    weight = model.lm_head.weight

    def ours(loss_fn):
        return lambda: loss_fn(model.model(inputs_embeds=hidden).last_hidden_state, weight, labels)

    losses = {
        "full logits": lambda: model(inputs_embeds=hidden, labels=labels).loss,
        "trl": lambda: model(inputs_embeds=hidden, labels=labels, fused_lm_head=True).loss,
        "labelled only": ours(labelled_only_loss),
        "chunked": ours(chunked_loss),
    }
    add_fused_lm_head(model)

    def step(loss_fn):
        def run() -> Tensor:
            hidden.grad = None
            loss = loss_fn()
            loss.backward()
            return loss

        return run

    return {name: step(loss_fn) for name, loss_fn in losses.items()}


def compare(vocab: int, dtype_name: str, size: dict) -> list[dict]:
    """Rows of one vocabulary and dtype: agreement with full logits, times faster, share of the extra memory."""
    model, hidden, labels = case(vocab, size["width"], size["seq"], DTYPES[dtype_name])
    steps = contestants(model, hidden, labels)
    results = {}
    for name, step in steps.items():
        loss = float(step().detach())
        results[name] = (loss, hidden.grad.float().clone())
    seconds = interleaved_seconds(steps, size["rounds"])
    peak = {name: peak_bytes(step) for name, step in steps.items()}
    rows = []

    def add(mine: str, what: str, unit: str, peer: str, values: dict, ratio: float | None, goal: str | None) -> None:
        rows.append({"name": f"V={vocab} {dtype_name} {mine}: {what}", "value": values[mine], "unit": unit,
                     "peer": peer, "peer_value": values[peer], "ratio": ratio, "goal": goal})  # fmt: skip

    faster_full, faster_trl, share = size["goals"]
    full_loss, full_grad = results["full logits"]
    middle = {name: median(times) for name, times in seconds.items()}
    for mine, goals in {"labelled only": (None, None, None), "chunked": (faster_full, faster_trl, share)}.items():
        loss, grad = results[mine]
        worst = max(abs(loss - full_loss) / full_loss, float((grad - full_grad).abs().max() / full_grad.abs().max()))
        differences = {mine: worst, "full logits": 0.0}
        add(mine, "relative difference of loss or gradient", "1", "full logits", differences, None, AGREE[dtype_name])
        for peer, goal in zip(("full logits", "trl"), goals, strict=False):
            add(mine, f"times faster than {peer}", "s", peer, middle, median_ratio(seconds, peer, mine), goal)
        for peer, goal in (("full logits", goals[2]), ("trl", None)):
            add(mine, f"share of the extra memory of {peer}", "bytes", peer, peak, peak[mine] / peak[peer], goal)
    return rows


@one_thread()
def run(quick: bool) -> list[dict]:
    """Rows for every vocabulary and dtype, on one thread; `quick` takes a small head and its own, lower goals."""
    size = QUICK if quick else FULL
    return [row for vocab in size["vocabs"] for name in DTYPES for row in compare(vocab, name, size)]
