"""Our training loop against TRL's SFTTrainer: the same loss, gradient norm and rate in every one of thirty steps."""

import contextlib

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from finetune_lab.lab import models, tasks, train
from finetune_lab.lab.micro_batches import curves_against_whole_batch
from finetune_lab.lab.packed import packed_batches
from finetune_lab.methods import schedules
from finetune_lab.methods.neftune import neftune

STEPS, EFFECTIVE, SEED = 30, 8, 3
RATES = {
    None: 2e-4,
    4: 2e-3,
}  # full fine-tuning at 5e-4 learns these items by heart: at a loss of 0.03, 1e-5 is rounding
# 36 items: four batches an epoch and a short one, so that the sampler's edges are passed several times in thirty steps
ITEMS = [{key: item[key] for key in ("prompt", "completion")} for item in tasks.load_task("answer", "train", 36)]


class SeedAtTheFirstStep(TrainerCallback):
    """The data loader draws a number of its own before the first step; ours does not. Noise needs equal random states."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            torch.manual_seed(args.seed)


def student(rank):
    model, tokenizer = models.load("tiny")
    return (train.add_lora(model, rank, seed=SEED) if rank else model), tokenizer


def trl_curve(folder, rank, accumulation, **settings):
    """TRL's log of the steps, and the model it made."""
    model, tokenizer = student(rank)
    args = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        logging_steps=1, max_length=None, seed=SEED, data_seed=SEED, learning_rate=RATES[rank],
        per_device_train_batch_size=EFFECTIVE // accumulation, gradient_accumulation_steps=accumulation,
        **{"max_steps": STEPS, "warmup_steps": 3, "lr_scheduler_type": "linear", "activation_checkpointing": False} | settings,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(ITEMS), processing_class=tokenizer,
        callbacks=[SeedAtTheFirstStep()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], model


def our_curve(rank, accumulation, alpha=None, steps=STEPS, **settings):
    """Our rows of the same steps, and the model they made."""
    model, tokenizer = student(rank)
    noise = neftune(model.get_input_embeddings(), alpha) if alpha else contextlib.nullcontext()
    with noise:
        rows = train.sft(
            model, tokenizer, ITEMS, steps=steps, batch_size=EFFECTIVE // accumulation, accumulation=accumulation,
            lr=RATES[rank], seed=SEED,
            **{"order": train.sampler_batches, "warmup": 3, "schedule": schedules.linear} | settings,
        )  # fmt: skip
    return rows, model


def furthest(ours, theirs, column, their_column=None):
    """The largest relative difference of a column over the steps."""
    pairs = [(row[column], other[their_column or column]) for row, other in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def assert_same_curve(ours, theirs):
    assert furthest(ours, theirs, "loss") <= 1e-5
    assert furthest(ours, theirs, "grad_norm") <= 1e-5
    assert furthest(ours, theirs, "lr", "learning_rate") <= 1e-12


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("rank", [None, 4], ids=["full", "LoRA"])
def test_thirty_steps_draw_trls_curve(tmp_path, rank, accumulation):
    ours, mine = our_curve(rank, accumulation)
    theirs, others = trl_curve(tmp_path, rank, accumulation)
    assert len(theirs) == STEPS
    assert_same_curve(ours, theirs)
    for weight, other in zip(mine.parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=RATES[rank] / 20)


def test_cosine_weight_decay_and_a_low_clip_are_the_same_too(tmp_path):
    ours, _ = our_curve(None, 2, steps=10, schedule=schedules.cosine, weight_decay=0.5, clip=0.1)
    theirs, _ = trl_curve(
        tmp_path, None, 2, max_steps=10, lr_scheduler_type="cosine", weight_decay=0.5, max_grad_norm=0.1
    )
    assert_same_curve(ours, theirs)


def test_weight_decay_spares_norms_as_transformers_does():
    model, _ = student(None)
    decayed = {id(p) for p in train.decay_groups(list(model.parameters()), 0.5)[0]["params"]}
    names = Trainer.get_decay_parameter_names(None, model)  # lists the tied head beside the embeddings
    assert decayed == {id(model.get_parameter(name)) for name in names}


def test_the_adapters_that_peft_config_makes_are_those_of_add_lora(tmp_path):
    """So a learner may hand TRL a `peft_config` and us `add_lora(model, rank, seed=args.seed)`."""
    mine, tokenizer = student(4)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], seed=SEED)
    trainer = SFTTrainer(
        model=models.load("tiny")[0], args=args, train_dataset=Dataset.from_list(ITEMS), processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )  # fmt: skip
    for weight, other in zip(mine.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_neftune_through_trl_is_our_hook_around_our_loop(tmp_path):
    settings = {"train_sampling_strategy": "sequential"}  # one epoch's end would draw a random number in TRL's loader
    ours, _ = our_curve(4, 1, alpha=5, order=train.in_order, steps=4)
    theirs, _ = trl_curve(tmp_path, 4, 1, neftune_noise_alpha=5, max_steps=4, **settings)
    quiet, _ = our_curve(4, 1, order=train.in_order, steps=4)
    assert furthest(ours, theirs, "loss") <= 1e-5 < furthest(quiet, theirs, "loss")


def test_padding_free_micro_batches_draw_trls_padding_free_curve(tmp_path):
    def flat(rows, _):
        return packed_batches(rows, [range(len(rows))])[0]

    ours, _ = our_curve(4, 2, steps=10, collator=flat)
    theirs, _ = trl_curve(tmp_path, 4, 2, max_steps=10, padding_free=True)
    assert_same_curve(ours, theirs)


def test_the_mean_of_micro_batch_means_is_another_curve():
    """What transformers did before 4.46: even with answers of nearly equal length fifty times the tolerance in six steps."""
    found = curves_against_whole_batch(seed=0, steps=6)
    assert found["4 x 4 against 16 x 1: largest distance"] <= 1e-5
    assert found["4 x 4, mean of means against 16 x 1: largest distance"] >= 50 * 1e-5
