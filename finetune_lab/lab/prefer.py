"""Preference training in one readable loop: encode pairs, log-probabilities, a loss, a step. The twin of `lab.train.sft`.

What: DPO and its relatives on pairs, KTO on single answers with a thumb; AdamW, linear warm-up and decay, clipping at 1.
The reference is the policy before its first step (computed once), the model with its adapter off, or another model.
Leaves out: accumulation, mixed precision, saving. Production: `trl.DPOTrainer`, `trl.KTOTrainer`; the losses are in
`finetune_lab.methods.preference`.
"""

import time
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_lab.errors import UserError
from finetune_lab.lab.pairs import (
    answer_length,
    encode_pairs,
    frozen_logps,
    pair_logps,
    row_logps,
    with_mismatched,
)
from finetune_lab.lab.train import Mask, Order, Schedule, batches, encode
from finetune_lab.methods import preference as p
from finetune_lab.methods.schedules import early_linear

Reference = str | Tensor | PreTrainedModel

# name -> (loss, are log-probabilities averaged over the answer's tokens); ipo reads beta as tau, orpo as lambda
LOSSES = {
    "dpo": (lambda policy, reference, nll, s: p.dpo_loss(*policy, *reference, s["beta"]), False),
    "cdpo": (lambda policy, reference, nll, s: p.cdpo_loss(*policy, *reference, s["beta"], s["epsilon"]), False),
    "robust": (
        lambda policy, reference, nll, s: p.robust_dpo_loss(*policy, *reference, s["beta"], s["epsilon"]),
        False,
    ),
    "hinge": (lambda policy, reference, nll, s: p.hinge_loss(*policy, *reference, s["beta"]), False),
    "ipo": (lambda policy, reference, nll, s: p.ipo_loss(*policy, *reference, s["beta"]), True),
    "simpo": (lambda policy, reference, nll, s: p.simpo_loss(*policy, s["beta"], s["gamma"]), True),
    "orpo": (lambda policy, reference, nll, s: p.orpo_loss(*policy, nll, s["beta"]), True),
}
WITHOUT_REFERENCE = ("simpo", "orpo")
TIE = 1e-4  # margins up to this are rounding: the same pair in another batch gives sums that differ by 1e-5


def pair_logps_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict]) -> Tensor:
    """Summed log-probabilities (2, n) of the answers of pairs. Kept from before training it can serve as a reference."""
    return frozen_logps(model, encode_pairs(tokenizer, pairs))


def pair_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[dict],
    *,
    reference: Reference,
    beta: float = 0.1,
) -> dict[str, float]:
    """How a policy judges held-out pairs: means over the pairs.

    accuracy: by implicit rewards, a tie = 1/2; plain_accuracy: by log pi alone; margin, chosen_reward, rejected_reward:
    carry beta; chosen_logp, rejected_logp: summed. reference: "adapter off", another model, or a tensor (2, n).
    """
    encoded = encode_pairs(tokenizer, pairs)
    policy = frozen_logps(model, encoded)
    before = _reference(model, reference, encoded, pair_logps)(range(len(encoded)))
    rewards = p.implicit_rewards(policy, before, beta)
    return {
        "accuracy": p.reward_accuracy(*rewards, TIE).item(),
        "plain_accuracy": p.reward_accuracy(*policy).item(),
        "margin": p.reward_margins(*rewards).mean().item(),
        **_means(rewards, policy),
    }


def dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[dict],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    beta: float = 0.1,
    loss: str | Callable = "dpo",
    epsilon: float = 0.1,
    gamma: float = 0.5,
    reference: Reference = "precomputed",
    mask: Mask = "completion",
    logps: Callable = pair_logps,
    warmup: int = 10,
    schedule: Schedule = early_linear,
    order: Order = batches,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[dict]:
    """Train the parameters of `model` that want a gradient on pairs, in place; returns a row a step.

    loss: a name of LOSSES, or a function with the arguments of `dpo_loss`. beta: IPO reads it as tau, ORPO as lambda.
    epsilon: flipped share, for cdpo and robust. gamma: margin of simpo.
    reference: "precomputed" (the policy as it is now), "adapter off", another model, or a tensor (2, n) of sums.
    logps: `shared_pair_logps` computes each prompt once. Rows: step, loss, accuracy, margin, rewards and summed
    log-probabilities of chosen and rejected answers, lr, seconds. Raises UserError for an unknown loss or reference.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise UserError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}, or give a function")
    encoded = encode_pairs(tokenizer, pairs, mask)
    visits = list(order(len(encoded), batch_size, steps, seed))
    if loss in WITHOUT_REFERENCE:
        reference = torch.zeros(2, len(encoded))
    before = _reference(model, reference, encoded, logps, sorted({i for chosen in visits for i in chosen}))
    settings = {"beta": beta, "epsilon": epsilon, "gamma": gamma}

    def loss_of(step: int, chosen: list[int]) -> tuple[Tensor, dict]:
        rows = [encoded[i] for i in chosen]
        policy, past = logps(model, rows), before(chosen).to(model.device)
        if callable(loss):
            value, *rewards = loss(*policy, *past, beta)
        else:
            formula, average = LOSSES[loss]
            lengths = torch.tensor([[answer_length(pair[side]) for pair in rows] for side in (0, 1)]).to(policy)
            nll = -policy[0].sum() / lengths[0].sum()
            unit = lengths if average else 1.0
            value, *rewards = formula(policy / unit, past / unit, nll, settings)
        figures = {
            "accuracy": p.reward_accuracy(*rewards, TIE).item(),
            "margin": p.reward_margins(*rewards).mean().item(),
            **_means(rewards, policy.detach()),
        }
        return value, figures

    return _train(model, visits, loss_of, [lr * schedule(step, steps, warmup) for step in range(steps)], seed, on_step)


def kto(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
    reference: Reference = "precomputed",
    warmup: int = 10,
    schedule: Schedule = early_linear,
    order: Order = batches,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[dict]:
    """KTO on rows of prompt, completion, label, in place; returns a row a step: loss, z0, rewards of good and bad answers.

    weights: lambda_D, lambda_U. reference: "precomputed" (the policy as it is now), "adapter off" or another model.
    z0 comes from the batch's answers, each under the next row's prompt; it needs batch_size >= 2, else UserError.
    """
    if batch_size < 2:
        raise UserError("batch_size is 1, but KTO estimates its reference point from mismatched rows: give 2 or more")
    encoded = encode(tokenizer, items)
    labels = torch.tensor([bool(item["label"]) for item in items])
    visits = list(order(len(encoded), batch_size, steps, seed))
    rows = [with_mismatched([encoded[i] for i in chosen]) for chosen in visits]
    before = _reference(model, reference, [row for step_rows in rows for row in step_rows], row_logps)
    firsts = [0, *accumulate(map(len, rows))]

    def loss_of(step: int, chosen: list[int]) -> tuple[Tensor, dict]:
        size = len(chosen)
        past, mismatched_past = before(range(firsts[step], firsts[step + 1])).to(model.device).view(2, -1)
        policy = row_logps(model, rows[step][:size])
        with torch.no_grad():
            mismatched = row_logps(model, rows[step][size:])
        z0 = p.kto_reference_point(mismatched, mismatched_past)
        good = labels[chosen].to(model.device)
        value, rewards = p.kto_loss(policy, past, good, z0, beta, *weights)
        means = {name: rewards[which].mean().item() for name, which in (("reward_good", good), ("reward_bad", ~good))}
        margin = means["reward_good"] - means["reward_bad"]  # nan in a batch of one kind of thumb
        return value, {"z0": z0.item(), **means, "margin": margin}

    return _train(model, visits, loss_of, [lr * schedule(step, steps, warmup) for step in range(steps)], seed, on_step)


def _means(rewards: Sequence[Tensor], logps: Sequence[Tensor]) -> dict[str, float]:
    names = ("chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
    return {name: values.mean().item() for name, values in zip(names, (*rewards, *logps), strict=True)}


def _reference(
    model: PreTrainedModel, reference: Reference, rows: Sequence, logps: Callable, used: Sequence[int] | None = None
) -> Callable[[Sequence[int]], Tensor]:
    """A function from indices of `rows` to the reference's log-probabilities of them, without gradient."""
    if isinstance(reference, Tensor):
        if reference.shape[-1] != len(rows):
            raise UserError(
                f"the reference holds log-probabilities of {reference.shape[-1]} pairs, but there are {len(rows)}: "
                "make it from the same pairs (pair_logps_of)"
            )
        return lambda chosen: reference[..., list(chosen)]
    if isinstance(reference, str) and reference == "precomputed":
        used = list(range(len(rows))) if used is None else used
        known = frozen_logps(model, [rows[i] for i in used], logps)
        place = {i: n for n, i in enumerate(used)}
        return lambda chosen: known[..., [place[i] for i in chosen]]
    if isinstance(reference, str) and reference == "adapter off":
        if not hasattr(model, "disable_adapter"):
            raise UserError('reference="adapter off" needs a peft model: add an adapter, or say "precomputed"')

        def without_adapter(chosen: Sequence[int]) -> Tensor:
            with model.disable_adapter():
                return frozen_logps(model, [rows[i] for i in chosen], logps)

        return without_adapter
    if isinstance(reference, str):
        raise UserError(
            f'unknown reference {reference!r}: say "precomputed", "adapter off", or give a model or a tensor'
        )
    return lambda chosen: frozen_logps(reference, [rows[i] for i in chosen], logps)


def _train(
    model: PreTrainedModel,
    visits: list[list[int]],
    loss_of: Callable[[int, list[int]], tuple[Tensor, dict]],
    rates: list[float],
    seed: int,
    on_step: Callable[[int, float], None] | None,
) -> list[dict]:
    """The loop of `lab.train.sft` around another loss: `loss_of(step, indices)` gives it with the step's figures."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    torch.manual_seed(seed)
    history, began = [], time.perf_counter()
    model.train()
    for step, (chosen, lr) in enumerate(zip(visits, rates, strict=True)):
        optimizer.param_groups[0]["lr"] = lr
        loss, figures = loss_of(step, chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        row = {"step": step, "loss": loss.item(), **figures, "lr": lr, "seconds": time.perf_counter() - began}
        history.append(row)
        if on_step:
            on_step(step, row["loss"])
    model.eval()
    return history
