"""Preference training over `trl.DPOTrainer` and `trl.KTOTrainer`: from a recipe to a report.

    report = dpo(DpoRecipe(task="reply", adapter="runs/sft-reply-tiny-lora"))

No trainer of our own: rows of text go in, TRL prepares and trains them. The reference is the model at the start of this
run: the base with its adapter off, the frozen copy of `adapter` that TRL makes, or log-probabilities computed beforehand.
In production: `trl dpo --config`, `trl kto --config`.
"""

import contextlib
from collections.abc import Callable, Iterator

import datasets
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from finetune_lab.errors import UserError
from finetune_lab.lab import models
from finetune_lab.lab.finetune import build, preflight_dpo, runs, score_pairs, watch
from finetune_lab.lab.finetune.dpo_recipe import DpoRecipe
from finetune_lab.lab.finetune.pairs import as_rated
from finetune_lab.lab.finetune.preflight import Preflight
from finetune_lab.lab.finetune.resuming import Resuming
from finetune_lab.lab.finetune.run import CURVE_ROWS
from finetune_lab.lab.finetune.session import REFERENCE, common_arguments, session


class ResumingDPOTrainer(Resuming, DPOTrainer):
    """TRL's trainer; a resumed run ends as an uninterrupted one does."""


class ResumingKTOTrainer(Resuming, KTOTrainer):
    """The same for answers with a label."""


def dpo(
    recipe: DpoRecipe,
    *,
    fresh: bool = False,
    on_step: watch.OnStep | None = None,
    say: Callable[[str], None] = print,
    found: Preflight | None = None,
) -> dict:
    """Train on preferences and return the report (the values of report.json); a run that was killed goes on.

    fresh: put an older run in the same folder aside. on_step(step, loss): for live curves. say: gets each line of text.
    found: a preflight of this recipe made before. Raises UserError for everything that can be known before training.
    """
    found = found or preflight_dpo.inspect(recipe)
    if problems := [f for f in found.findings if f.level == "error"]:
        raise UserError(" ".join(f"{f.found} {f.fix}" for f in problems))
    recipe, kto = found.recipe, found.recipe.loss == "kto"
    settings = (kto_arguments if kto else dpo_arguments)(found)  # under torchrun this starts the process group

    def make_trainer(model, tokenizer) -> Resuming:
        with quiet_datasets():
            trainer = (ResumingKTOTrainer if kto else ResumingDPOTrainer)(
                model=model,
                args=settings,
                processing_class=tokenizer,
                peft_config=None if recipe.adapter else build.adapter_config(recipe, model),
                train_dataset=_table(found.rows.train),
                eval_dataset=_table(_scored_rows(found)),
            )
        return with_equal_reference(trainer)

    def scorer(model, tokenizer, before: dict | None) -> dict:
        return score_pairs.score(
            model, tokenizer, found.valid_rows, found.valid, task=recipe.task, beta=recipe.beta, before=before
        )

    return session(
        found, make_trainer, scorer if found.valid_rows else None, load=load, fresh=fresh, on_step=on_step, say=say
    )


def load(recipe: DpoRecipe):
    """`(model, tokenizer)` of a completed recipe: the base, with the adapter that goes on training if there is one."""
    model, tokenizer = build.load(recipe)
    if recipe.adapter:
        with build.quiet_peft():
            model = PeftModel.from_pretrained(model, runs.find_adapter(recipe.adapter), is_trainable=True)
        # peft looks there when it saves; `session.save` writes the name back
        model.peft_config["default"].base_model_name_or_path = str(models.locate(recipe.model))
    return model, tokenizer


def dpo_arguments(found: Preflight) -> DPOConfig:
    """The recipe in the words of TRL's DPO trainer."""
    recipe = found.recipe
    return DPOConfig(
        **common_arguments(recipe, score=bool(_scored_rows(found))),
        loss_type=[recipe.loss],
        label_smoothing=recipe.label_smoothing,
        beta=recipe.beta,
        precompute_ref_log_probs=recipe.reference == "precomputed",
        max_length=recipe.max_length,
    )


def kto_arguments(found: Preflight) -> KTOConfig:
    """The recipe in the words of TRL's KTO trainer."""
    recipe = found.recipe
    return KTOConfig(
        **common_arguments(recipe, score=bool(_scored_rows(found))),
        beta=recipe.beta,
        desirable_weight=recipe.desirable_weight,
        undesirable_weight=recipe.undesirable_weight,
        precompute_ref_log_probs=recipe.reference == "precomputed",
        max_length=recipe.max_length,
    )


def with_equal_reference(trainer: Resuming) -> Resuming:
    """Give the frozen copy the precision of the adapter: TRL 1.16 makes the one bf16 (QLoRA) and leaves the other fp32,
    so that policy and reference would differ before the first step."""
    types = {name: p.dtype for name, p in trainer.model.named_parameters()}
    for name, p in trainer.model.named_parameters():
        if f".{REFERENCE}." in name:
            p.data = p.data.to(types[name.replace(f".{REFERENCE}.", ".default.")])
    return trainer


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars while TRL maps its rows."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _scored_rows(found: Preflight) -> list[dict]:
    """The held-out rows whose loss is measured during training, in the trainer's format."""
    kept = [row for row, e in zip(found.valid_rows, found.valid, strict=True) if e.counted][:CURVE_ROWS]
    return as_rated(kept, found.recipe.seed) if found.recipe.loss == "kto" else kept


def _table(rows: list[dict]) -> Dataset | None:
    columns = ("prompt", "chosen", "rejected", "completion", "label")
    return Dataset.from_list([{k: row[k] for k in columns if k in row} for row in rows]) if rows else None
