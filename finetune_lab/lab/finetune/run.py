"""Supervised fine-tuning over `trl.SFTTrainer`: from a recipe to a report.

    report = sft(SftRecipe(task="extract"))               # sft(recipe, on_step=curve) in a notebook

No trainer of our own: rows that are already tokenised and masked go in, TRL trains. In production: `trl sft --config`.
"""

from collections.abc import Callable

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from finetune_lab.errors import UserError
from finetune_lab.lab.finetune import build, preflight, score, watch
from finetune_lab.lab.finetune.encode import Example
from finetune_lab.lab.finetune.preflight import Preflight
from finetune_lab.lab.finetune.recipe import SftRecipe
from finetune_lab.lab.finetune.resuming import Resuming
from finetune_lab.lab.finetune.session import common_arguments, session

CURVE_ROWS = 32  # held-out rows whose loss is measured during training; before and after, all of them are scored


class ResumingSFTTrainer(Resuming, SFTTrainer):
    """TRL's trainer; a resumed run ends as an uninterrupted one does."""


def sft(
    recipe: SftRecipe,
    *,
    fresh: bool = False,
    on_step: watch.OnStep | None = None,
    say: Callable[[str], None] = print,
    found: Preflight | None = None,
) -> dict:
    """Fine-tune and return the report (the values of report.json); a run that was killed goes on.

    fresh: put an older run in the same folder aside. on_step(step, loss): for live curves. say: gets each line of text.
    found: a preflight of this recipe made before. Raises UserError for everything that can be known before training.
    """
    found = found or preflight.inspect(recipe)
    if problems := [f for f in found.findings if f.level == "error"]:
        raise UserError(" ".join(f"{f.found} {f.fix}" for f in problems))
    settings = arguments(found)  # under torchrun this starts the process group

    def make_trainer(model, tokenizer) -> ResumingSFTTrainer:
        return ResumingSFTTrainer(
            model=model,
            args=settings,
            processing_class=tokenizer,
            peft_config=build.adapter_config(found.recipe, model),
            train_dataset=_table(found.train),
            eval_dataset=_table(found.valid[:CURVE_ROWS]) if found.valid else None,
        )

    def scorer(model, tokenizer, before: dict | None) -> dict:
        scores, said = score.score(model, tokenizer, found.valid_rows, found.valid, found.recipe.task)
        return {"scores": scores, "answers": said}

    return session(found, make_trainer, scorer if found.valid_rows else None, fresh=fresh, on_step=on_step, say=say)


def arguments(found: Preflight) -> SFTConfig:
    """The recipe in TRL's words."""
    recipe = found.recipe
    return SFTConfig(
        **common_arguments(recipe, score=bool(found.valid)),
        packing=recipe.packing,
        max_length=recipe.max_length if recipe.packing else None,  # our rows are cut already
        neftune_noise_alpha=recipe.neftune,
    )


def _table(examples: list[Example]) -> Dataset:
    return Dataset.from_list([{"input_ids": e.ids, "labels": e.labels} for e in examples])
