"""All that can be known before preference training starts: `preflight` for pairs and for labels."""

from dataclasses import replace

from finetune_lab.errors import UserError
from finetune_lab.lab.finetune import pairs, preflight, silent, silent_pairs, sources
from finetune_lab.lab.finetune.dpo_recipe import DpoRecipe
from finetune_lab.lab.finetune.preflight import Preflight


def inspect_second(recipe: DpoRecipe) -> Preflight:
    """`inspect` for a run whose start does not exist yet: the recipe is `after_a_start`."""
    return inspect(recipe, started=True)


def inspect(recipe: DpoRecipe, started: bool = False) -> Preflight:
    """Read and check everything for preference training. Raises UserError for what would make it useless.

    With loss kto the training rows are rated answers: pairs count as one good and one bad answer each.
    started: the adapter that goes on training is still to be made, so `recipe` does not name it.
    """
    recipe, tokenizer, parameters = preflight.opened(recipe)
    rows = sources.read(recipe, tokenizer, parameters, ("preference", "unpaired"))
    recipe = recipe.completed(parameters, loss="sigmoid" if rows.kind == "preference" else "kto", reference="live")
    if rows.kind == "unpaired" and recipe.loss != "kto":
        raise UserError(f"loss {recipe.loss} compares two answers, but the rows are single ones with a label: use kto.")
    if recipe.loss == "kto":
        if recipe.batch_size < 2:
            raise UserError(
                "batch_size is 1: kto estimates its reference point from the other rows of a batch. Give 2 or more."
            )
        if rows.kind == "preference":
            rows = replace(rows, notes=(*rows.notes, "each pair counts as one good and one bad answer"))
        lines = pairs.lines_of_rated(rows.train, rows.lines, recipe.seed) if rows.lines else []
        rows = replace(rows, train=pairs.as_rated(rows.train, recipe.seed), lines=tuple(lines))
    encoded = pairs.encode_preferences(rows.train, tokenizer, recipe.max_length)
    valid = pairs.encode_preferences(rows.valid[: recipe.test_items], tokenizer, recipe.max_length)
    train = [e for e in encoded if e.counted]
    found = [
        silent.rate_out_of_range(recipe.method, recipe.lr, parameters, "dpo-start" if started else recipe.kind()),
        silent.repeated(list(map(sources.row_key, rows.every)), rows.every_line),
        silent.few_scored(len(valid)),
        silent_pairs.prompt_in_answers(rows.every, rows.every_line),
        None if started else silent_pairs.no_start(recipe.adapter, recipe.model),
    ]
    if recipe.loss == "kto":
        kinds = silent_pairs.one_kind_of_label(encoded, recipe.desirable_weight, recipe.undesirable_weight)
        against = silent_pairs.labelled_both_ways(rows.every, rows.every_line) if rows.kind == "unpaired" else None
        if against and kinds and kinds.level == "warning":  # weights would strengthen one side of the contradiction
            kinds = None
        found += [against, kinds]
    if rows.kind == "preference":
        found.append(silent_pairs.both_ways(rows.every, rows.every_line))
    if recipe.loss != "kto":
        found += [silent_pairs.same_answer(encoded, rows.lines), silent_pairs.length_decides(encoded)]
    # TRL would drop these rows itself, without a word
    rows = replace(rows, train=[row for row, e in zip(rows.train, encoded, strict=True) if e.counted])
    previews = [pairs.preview_preference(e, tokenizer) for e in (train or encoded)[:3]]
    return preflight.concluded(
        recipe, tokenizer, parameters, rows, encoded, valid, len(train),
        findings=found, previews=previews, objective="kto" if recipe.loss == "kto" else "dpo",
    )  # fmt: skip
