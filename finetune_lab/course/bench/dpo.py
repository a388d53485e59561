"""Bench `dpo`: one DPO step, ours against TRL's and against the textbook's, on the CPU.

A step is loss and gradients of one batch of pairs; same weights, same reference, same batch, gradients compared.
"trl" is `DPOTrainer.compute_loss` with its defaults but fp32 and no gradient checkpointing. "textbook" makes full logits
of chosen and rejected rows, policy and reference. "ours" scores the answers' tokens only, tile by tile of the
vocabulary, and computes a shared prompt once; its reference is the model with the adapter off, or log-probabilities
that were computed before training, as everybody does who trains more than one epoch.
TRL's head compacts to the answers' tokens on GPUs with Triton only: the ratios to it hold for CPUs.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from finetune_lab.lab import tabular
from finetune_lab.lab.meter import interleaved_seconds, median_ratio, one_thread, peak_bytes
from finetune_lab.lab.models import load_tokenizer
from finetune_lab.lab.pairs import frozen_logps, pair_logps, shared_pair_logps
from finetune_lab.methods import preference as p

NAME = "dpo"
HELP = "one DPO step: answers' tokens only, shared prompt, cheap reference, against TRL and full logits"

BETA = 0.1
# goals: times faster than TRL, than the textbook; share of the extra bytes of either
FULL = {"vocab": 49_152, "width": 512, "inner": 1365, "layers": 3, "prompt": 192, "answer": 64, "pairs": 2, "rounds": 3,
        "goals": (">= 5", ">= 3.5", "<= 0.2")}  # fmt: skip
QUICK = {"vocab": 8_192, "width": 128, "inner": 341, "layers": 2, "prompt": 96, "answer": 32, "pairs": 2, "rounds": 5,
         "goals": (">= 2", ">= 1.5", "<= 0.4")}  # fmt: skip
GOALS_OF = {"LoRA": ("ours, adapter off", "ours, precomputed"), "full": ("ours, precomputed",)}
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


@contextmanager
def quiet():
    """No progress bars of datasets, no FutureWarning of peft 0.21.2 (it reads a name that transformers 5.23 renamed)."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def case(size: dict, lora: bool, folder: str) -> tuple[DPOTrainer, list]:
    """TRL's trainer around a random Llama that has left its reference, and a batch of encoded pairs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocab"], hidden_size=size["width"], intermediate_size=size["inner"],
        num_hidden_layers=size["layers"], num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    reference = LlamaForCausalLM(config)
    policy = reference if lora else copy.deepcopy(reference)
    ids = torch.randint(size["vocab"], (size["pairs"], size["prompt"] + 2 * size["answer"])).tolist()
    start, length = size["prompt"], size["answer"]
    pairs = []
    for row in ids:
        answers = (row[start : start + length], row[start + length :])
        pairs.append(tuple((row[:start] + a, [-100] * start + a) for a in answers))
    args = DPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], beta=BETA, activation_checkpointing=False
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])  # the batch comes from us
    trainer = DPOTrainer(model=policy, ref_model=None if lora else reference, args=args, train_dataset=text,
                         processing_class=load_tokenizer("tiny"), peft_config=LORA if lora else None)  # fmt: skip
    trainer.model.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += (0.1 if lora else 0.02) * torch.randn_like(parameter)
    return trainer, pairs


def contestants(trainer: DPOTrainer, pairs: list) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function that computes loss and gradients, and returns the loss."""
    model, lora = trainer.model, trainer.ref_model is None
    reference = model if lora else trainer.ref_model
    rows = [row for side in zip(*pairs, strict=True) for row in side]  # chosen, then rejected
    ids = torch.tensor([row[0] for row in rows])
    labels = torch.tensor([row[1] for row in rows])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": (labels != -100).long()}

    @contextmanager
    def as_reference():
        with torch.no_grad(), model.disable_adapter() if lora else nullcontext():
            yield reference

    def full_logits(model) -> Tensor:
        return p.sequence_logps(model(input_ids=ids, use_cache=False).logits, labels).view(2, -1)

    def loss_of(logps: Callable, known: Tensor | None = None) -> Tensor:
        policy = logps(model)
        if known is None:
            with as_reference() as frozen:
                known = logps(frozen)
        return p.dpo_loss(*policy, *known, BETA)[0]

    with as_reference() as frozen:
        known = frozen_logps(frozen, pairs)
    off = "adapter off" if lora else "reference model"
    losses = {
        "trl": lambda: trainer.compute_loss(model, dict(batch)),
        "textbook": partial(loss_of, full_logits),
        f"ours, {off}": partial(loss_of, partial(shared_pair_logps, pairs=pairs)),
        "ours, precomputed": partial(loss_of, partial(shared_pair_logps, pairs=pairs), known),
    }
    if lora:
        losses[f"answers only, {off}"] = partial(loss_of, partial(pair_logps, pairs=pairs))

    def step(loss_fn):
        def run() -> Tensor:
            model.zero_grad(set_to_none=False)  # the buffers of the gradients stay: nobody is charged for them
            loss = loss_fn()
            loss.backward()
            return loss.detach()

        return run

    return {name: step(loss_fn) for name, loss_fn in losses.items()}


def compare(size: dict, lora: bool) -> list[dict]:
    """Rows of one setting: agreement with the textbook, times faster than TRL and the textbook, share of their bytes."""
    setting = "LoRA" if lora else "full"
    with tempfile.TemporaryDirectory() as folder:
        trainer, pairs = case(size, lora, folder)
    steps = contestants(trainer, pairs)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    results = {}
    for name, step in steps.items():
        loss = float(step())
        results[name] = loss, [parameter.grad.clone() for parameter in trained]
    loss, grads = results["textbook"]
    largest = max(float(g.abs().max()) for g in grads)
    difference = {
        name: max(abs(other - loss) / loss, *(float((a - b).abs().max()) / largest for a, b in zip(g, grads, strict=True)))
        for name, (other, g) in results.items()
    }  # fmt: skip
    del results, grads
    seconds = interleaved_seconds(steps, size["rounds"])
    middle = {name: median(times) for name, times in seconds.items()}
    peak = {name: peak_bytes(step) for name, step in steps.items()}
    rows = []

    def add(mine: str, what: str, unit: str, peer: str, values: dict, ratio: float | None, goal: str | None) -> None:
        rows.append({"name": f"{setting}, {mine}: {what}", "value": values[mine], "unit": unit,
                     "peer": peer, "peer_value": values[peer], "ratio": ratio, "goal": goal})  # fmt: skip

    add("trl", "relative difference of loss or gradient", "1", "textbook", difference, None, None)
    for mine in [name for name in steps if name not in ("trl", "textbook")]:
        faster_trl, faster_textbook, share = size["goals"] if mine in GOALS_OF[setting] else (None, None, None)
        add(mine, "relative difference of loss or gradient", "1", "textbook", difference, None, "<= 1e-05")
        for peer, goal in (("trl", faster_trl), ("textbook", faster_textbook)):
            add(mine, f"times faster than {peer}", "s", peer, middle, median_ratio(seconds, peer, mine), goal)
            add(mine, f"share of the extra bytes of {peer}", "bytes", peer, peak, peak[mine] / peak[peer], share)
    rows += _profile(setting, middle, peak, trainer)
    return rows


def _profile(setting: str, seconds: dict, peak: dict, trainer: DPOTrainer) -> list[dict]:
    """What precomputing costs once, in steps; and how much of our peak is the gradient of the matrix used at both ends."""
    mine = "ours, precomputed"
    other = next(name for name in seconds if name.startswith("ours") and name != mine)
    rows = [{"name": f"{setting}, the reference's pass over the batch, in steps with it precomputed",
             "value": seconds[other] - seconds[mine], "unit": "s", "peer": mine, "peer_value": seconds[mine],
             "ratio": (seconds[other] - seconds[mine]) / seconds[mine]}]  # fmt: skip
    if setting == "full":
        tied = 2 * trainer.model.get_output_embeddings().weight.nbytes  # made as head and as embedding, then added
        rows.append({"name": "full, ours, precomputed: share of the extra bytes that is the tied matrix's two gradients",
                     "value": tied, "unit": "bytes", "peer": mine, "peer_value": peak[mine],
                     "ratio": tied / peak[mine]})  # fmt: skip
    return rows


def closed_form(steps: int) -> list[dict]:
    """Rows of a world of five answers: what DPO and IPO reach against their optimum, and what a sure preference does."""
    torch.manual_seed(0)
    reference, reward, beta = torch.softmax(torch.randn(5), 0), torch.randn(5), 0.5
    prefer = p.bradley_terry(reward[:, None], reward[None])
    optimum = {"DPO": p.kl_optimum(reference, reward, beta), "IPO": p.kl_optimum(reference, prefer.mean(1), beta)}
    loss = {"DPO": partial(p.dpo_loss, beta=beta), "IPO": partial(p.ipo_loss, tau=beta)}
    rows = []
    for name, best in optimum.items():
        policy = tabular.train(reference, prefer, loss[name], steps=steps)["policy"]
        rows.append({"name": f"five answers, {name}: total variation to its closed-form optimum", "unit": "1",
                     "value": float(p.total_variation(policy, best)), "peer": "the reference",
                     "peer_value": float(p.total_variation(reference, best)), "goal": "<= 0.02"})  # fmt: skip
    half, sure = torch.tensor([0.5, 0.5]), torch.tensor([[0.5, 1.0], [0.0, 0.5]])
    for name in loss:
        margins = tabular.train(half, sure, loss[name], steps=4 * steps)["margins"]
        rows.append({"name": f"two answers, one always preferred, {name}: margin after {4 * steps} steps", "unit": "nats",
                     "value": margins[-1], "peer": f"after {steps} steps", "peer_value": margins[steps - 1],
                     "ratio": margins[-1] / margins[steps - 1],
                     "goal": ">= 1.1" if name == "DPO" else "<= 1.001"})  # fmt: skip
    return rows


@one_thread()
def run(quick: bool) -> list[dict]:
    """Rows of a LoRA step and of a step of all weights, on one thread; `quick` takes a small model and lower goals."""
    size = QUICK if quick else FULL
    with quiet():
        steps = [row for lora in (True, False) for row in compare(size, lora)]
    return steps + closed_form(steps=100 if quick else 300)
