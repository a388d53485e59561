"""All that can be known before training starts, in seconds and without loading the model.

Bad lines stop here (lab.data names them all); then token lengths, what is cut, three examples with their mask, memory
next to this machine, and the silent failures of `silent`. `finetune-lab sft ... --check` prints it and stops.
"""

import math
import os
import statistics
from dataclasses import asdict, dataclass, replace

import torch

from finetune_lab.errors import UserError
from finetune_lab.lab import models
from finetune_lab.lab.finetune import build, encode, memory, silent, sources
from finetune_lab.lab.finetune.encode import Example
from finetune_lab.lab.finetune.pairs import Pair, Rated
from finetune_lab.lab.finetune.recipe import AnyRecipe, Recipe, SftRecipe
from finetune_lab.lab.finetune.silent import Finding

LONGEST_DEFAULT = 1024  # TRL's own default of max_length


@dataclass(frozen=True)
class Preflight:
    """A completed recipe, its rows and examples (those that train), and what was found about them."""

    recipe: Recipe
    parameters: int
    rows: sources.Rows
    train: list[Example | Pair]
    valid: list[Example | Pair]
    valid_rows: list[dict]
    total_steps: int
    memory: dict | None
    free_bytes: int
    previews: list[str]
    findings: list[Finding]

    def kind(self) -> str:
        """The format that is trained on, as in `data.FORMATS`: with loss kto pairs have become single answers."""
        return "unpaired" if isinstance(self.train[0] if self.train else None, Rated) else self.rows.kind

    def lengths(self) -> dict:
        """Tokens of the training examples: rows, all, median and longest sequence (a pair has two), share that counts in the loss."""
        sequences = [s for e in self.train for s in ((e.chosen, e.rejected) if isinstance(e, Pair) else (e,))]
        sizes = [len(s.ids) for s in sequences]
        return {
            "rows": len(self.train), "tokens": sum(sizes), "median": statistics.median(sizes), "longest": max(sizes),
            "labelled_share": silent.labelled_share(self.train),
        }  # fmt: skip

    def as_dict(self) -> dict:
        """For --json and the report."""
        return {
            "recipe": asdict(self.recipe), "parameters": self.parameters, "data": self.lengths(),
            "kind": self.kind(), "scored_rows": len(self.valid_rows), "notes": list(self.rows.notes),
            "total_steps": self.total_steps, "memory": self.memory, "free_bytes": self.free_bytes,
            "previews": self.previews, "findings": [asdict(f) for f in self.findings],
        }  # fmt: skip


def processes() -> int:
    """How many processes train together (torchrun sets WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def inspect(recipe: SftRecipe) -> Preflight:
    """Read and check everything for supervised fine-tuning. Raises UserError for what would make training useless."""
    recipe, tokenizer, parameters = opened(recipe)
    rows = sources.read(recipe, tokenizer, parameters, ("messages", "prompt-completion"))
    recipe = recipe.completed(parameters, loss="assistant" if rows.kind == "messages" else "completion")
    encoded = encode.encode_all(rows.train, tokenizer, recipe.loss, recipe.max_length)
    scored = rows.valid[: recipe.test_items]
    valid = encode.encode_all(scored, tokenizer, recipe.loss, recipe.max_length)
    train = [e for e in encoded if e.counted]
    count = len(train)
    if recipe.packing:
        count = math.ceil(sum(len(e.ids) for e in train) / recipe.max_length)
    findings = [
        silent.rate_out_of_range(recipe.method, recipe.lr, parameters),
        silent.no_generation_marks(tokenizer, recipe.loss),
        silent.repeated(list(map(sources.row_key, rows.every)), rows.every_line),
        silent.few_scored(len(scored)),
    ]
    previews = [encode.preview(e, tokenizer) for e in (train or encoded)[:3]]
    return concluded(
        recipe,
        tokenizer,
        parameters,
        rows,
        encoded,
        valid,
        count,
        findings=findings,
        previews=previews,
        objective="sft",
    )


def opened(recipe: AnyRecipe) -> tuple[AnyRecipe, object, int]:
    """(the recipe with its model's defaults, tokenizer, number of parameters), after a look at model and machine."""
    tokenizer = models.load_tokenizer(recipe.model)
    parameters = build.parameters_of(recipe.model)
    context = models.context_length(recipe.model) or 10**9
    if recipe.max_length and recipe.max_length > context:
        raise UserError(
            f"max_length {recipe.max_length} is more than the {context} tokens that {recipe.model} can read."
        )
    recipe = recipe.completed(parameters, max_length=min(context, LONGEST_DEFAULT), precision=build.default_precision())
    build.check_machine(recipe)
    return recipe, tokenizer, parameters


def concluded(
    recipe, tokenizer, parameters: int, rows: sources.Rows, encoded: list, valid: list, count: int, *,
    findings: list, previews: list[str], objective: str,
) -> Preflight:  # fmt: skip
    """The preflight of any trainer: steps, memory, and what is found the same way for all of them.

    encoded: every training row; those without a token that counts are left out. count: rows that a pass over the data
    takes. objective: as in `methods.memory`.
    """
    train = [e for e in encoded if e.counted]
    cuda = build.device_of(recipe.model) != "cpu"
    longest, lines = max(e.longest for e in train or encoded), rows.lines
    need = memory.estimated(recipe, models.locate(recipe.model), longest, cuda, objective)
    free, end, total, scored = memory.free_bytes(cuda), encode.turn_end(tokenizer), 0, rows.valid[: recipe.test_items]
    if train:
        total = steps_of(recipe, count)
        recipe = replace(recipe, save_every=recipe.save_every or math.ceil(total / 10))
    findings = [
        silent.no_labelled_token(encoded, lines),
        silent.end_of_turn_not_in_loss(encoded, end),
        silent.answer_cut_off(encoded, recipe.max_length, lines),
        silent.double_bos(encoded, tokenizer.bos_token_id, lines),
        silent.warmup_too_long(recipe.warmup, total) if train else None,
        silent.same_in_both(list(map(sources.prompt_key, rows.train)), list(map(sources.prompt_key, scored))),
        silent.pad_is_eos(tokenizer, end),
        silent.fsdp_without_gpu(torch.cuda.is_available()),
        None if recipe.task else silent.nothing_held_out(len(rows.valid)),
        memory.too_little(need, free),
        *findings,
    ]
    order = {"error": 0, "warning": 1, "note": 2}
    return Preflight(
        recipe, parameters, rows, train, valid, scored, total, need, free, previews,
        sorted((f for f in findings if f), key=lambda f: order[f.level]),
    )  # fmt: skip


def steps_of(recipe: Recipe, count: int) -> int:
    """Optimizer steps of the run over `count` rows (with packing: an estimate of the packed rows)."""
    if recipe.steps:
        return recipe.steps
    forwards = math.ceil(count / (recipe.batch_size * processes()))
    return math.ceil(recipe.epochs * max(1, math.ceil(forwards / recipe.accumulation)))


def lines(found: Preflight) -> list[str]:
    """The preflight for people."""
    r, data = found.recipe, found.lengths() if found.train else None
    what = "all parameters" if r.method == "full" else f"rank {r.rank}, alpha {r.alpha:g}"
    batch = r.batch_size * r.accumulation * processes()
    size = f"{found.parameters / 1e6:.3g} million parameters"
    steps = f"{found.total_steps} steps of {batch} sequences"
    out = [f"{r.method} on {r.model} ({size}): {what}, {r.precision}, lr {r.lr:g}, {steps}"]
    if data:
        out.append(
            f"data: {data['rows']} rows ({found.kind()}), {data['tokens']:,} tokens, median {data['median']:g}, "
            f"longest {data['longest']}; {data['labelled_share']:.0%} of the tokens count in the loss ({r.loss})"
        )
    out += [f"data: {note}" for note in found.rows.notes]
    if found.memory:
        out.append(
            f"memory: about {memory.gb(found.memory['bytes'])} at the peak ({found.memory['moment']}) beside the "
            f"libraries; {memory.gb(found.free_bytes)} are free"
        )
    else:
        out.append(f"memory: not estimated for this architecture; {memory.gb(found.free_bytes)} are free")
    out.append("what the model learns to write stands between [[ and ]]:")
    out += ["  " + text.replace("\n", "\n  ") for text in found.previews]
    return out + [str(finding) for finding in found.findings]
