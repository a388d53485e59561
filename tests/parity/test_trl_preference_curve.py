"""Our preference loop against TRL's trainers on the tiny model: the same twenty steps, one after another."""

import contextlib
import copy

import pytest
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from peft import LoraConfig
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from finetune_lab.lab import models, pairs, prefer, tasks, train
from finetune_lab.methods import schedules

STEPS, BATCH, SEED, RATE = 20, 2, 3, 1e-3
ROWS = pairs.as_pairs(tasks.load_task("reply", "train", 12))  # three epochs and a bit
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


@contextlib.contextmanager
def quiet():
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def trained_by_trl(trainer_class, config_class, rows, folder, lora, **more):
    """The policy before training, and TRL's log of every step. LoRA: adapter off is the reference; else precomputed."""
    model, tokenizer = models.load("tiny")
    args = config_class(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        logging_steps=1, max_length=None, max_steps=STEPS, per_device_train_batch_size=BATCH, seed=SEED, data_seed=SEED,
        learning_rate=RATE if lora else RATE / 10, lr_scheduler_type="linear", warmup_steps=3,
        activation_checkpointing=False, precompute_ref_log_probs=not lora, **more,
    )  # fmt: skip
    with quiet():
        trainer = trainer_class(model=model, args=args, train_dataset=Dataset.from_list(rows),
                                processing_class=tokenizer, peft_config=LORA if lora else None)  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        start = copy.deepcopy(trainer.model)
        trainer.train()
    return start, tokenizer, [row for row in trainer.state.log_history if "loss" in row]


def settings(lora, order):
    return {"steps": STEPS, "batch_size": BATCH, "lr": RATE if lora else RATE / 10, "seed": SEED, "warmup": 3,
            "schedule": schedules.linear, "order": order,
            "reference": "adapter off" if lora else "precomputed"}  # fmt: skip


def furthest(ours, theirs, names):
    """The largest difference of each column over the steps, as a share of the column's own largest value."""
    assert len(ours) == len(theirs) == STEPS
    return {
        mine: max(abs(a[mine] - b[their]) for a, b in zip(ours, theirs, strict=True)) / max(abs(b[their]) for b in theirs)
        for mine, their in names.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "lora"), [("sigmoid", True), ("sigmoid", False), ("ipo", False)],
    ids=["dpo, adapter off", "dpo, precomputed", "ipo, precomputed"],
)  # fmt: skip
def test_twenty_steps_of_dpo_draw_trls_curve(tmp_path, lora, loss):
    start, tokenizer, theirs = trained_by_trl(DPOTrainer, DPOConfig, ROWS, tmp_path, lora, loss_type=loss)
    name = {"sigmoid": "dpo"}.get(loss, loss)
    ours = prefer.dpo(start, tokenizer, ROWS, loss=name, **settings(lora, train.sampler_batches))
    columns = {"loss": "loss", "chosen_logp": "logps/chosen", "rejected_logp": "logps/rejected", "lr": "learning_rate"}
    if loss == "sigmoid":  # TRL's rewards of IPO are not averaged over the tokens
        columns |= {"margin": "rewards/margins", "chosen_reward": "rewards/chosen"}
    worst = furthest(ours, theirs, columns)
    assert ours[-1]["loss"] < 0.7 * ours[0]["loss"]  # it learns: the curve is no flat line
    assert max(worst.values()) <= 2e-5, worst


def test_twenty_steps_of_kto_draw_trls_curve(tmp_path):
    thumbs = [row for pair in ROWS for row in pairs.as_thumbs([pair])]
    start, tokenizer, theirs = trained_by_trl(KTOTrainer, KTOConfig, thumbs, tmp_path, lora=True)
    ours = prefer.kto(start, tokenizer, thumbs, **settings(True, train.in_order))
    worst = furthest(ours, theirs, {"loss": "loss", "reward_good": "rewards/chosen", "z0": "kl", "lr": "learning_rate"})
    assert ours[-1]["loss"] < 0.8 * ours[0]["loss"]
    assert max(worst.values()) <= 2e-5, worst
