"""Bench `masking`: the loss over answers only against the loss over every token, on the tiny model, five seeds.

Both sides see the same items in the same order and take the same steps; only the labels differ. Each row is a mean
over the seeds, with its standard deviation in a row of its own. No goals: whatever comes out is what the lesson says.
"""

from statistics import mean, stdev

import torch

from finetune_lab.lab import generate, tasks, train
from finetune_lab.lab.evaluate import LONGEST_ANSWER, general
from finetune_lab.lab.models import load
from finetune_lab.lab.tiers import TINY
from finetune_lab.methods.loss import sft_loss

NAME = "masking"
HELP = "loss over answers only against loss over every token: exact match, held-out loss, parroting, forgetting"

# name -> task, training items, steps: where the steps of the lab's recipe would leave nothing to compare, fewer
SETTINGS = {"answer": ("answer", 500, 100), "extract": ("extract", 200, 30), "extract, 8 items": ("extract", 8, 15)}
PEER = "every token"


@torch.no_grad()
def answer_loss(model, tokenizer, items: list[dict]) -> float:
    """Token-mean loss of the reference answers, in nats: the finest measure of what was learnt."""
    batch = train.collate(train.encode(tokenizer, items), tokenizer.pad_token_id)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return sft_loss(logits, batch["labels"]).item()


def parroting(said: list[str], items: list[dict]) -> float:
    """Share of the answers that repeat at least four words of the question in a row."""
    hits = 0
    for text, item in zip(said, items, strict=True):
        asked = item["prompt"][-1]["content"].split()
        hits += any(" ".join(asked[i : i + 4]) in text for i in range(len(asked) - 3))
    return hits / len(items)


def one_run(setting: str, mask: str, seed: int, test_items: int) -> dict[str, float]:
    """Fine-tune the tiny model once and measure it on held-out items."""
    task, count, steps = SETTINGS[setting]
    recipe = TINY.recipes[task]
    model, tokenizer = load("tiny", seed=seed)
    model = train.add_lora(model, recipe.rank, seed=seed)
    train.sft(
        model, tokenizer, tasks.load_task(task, "train", count, seed), steps=steps,
        batch_size=recipe.batch_size, lr=recipe.lora_lr, seed=seed, mask=mask,
    )  # fmt: skip
    items = tasks.load_task(task, "test", test_items)
    said = generate.answer(model, tokenizer, [i["prompt"] for i in items], max_new_tokens=LONGEST_ANSWER[task])
    scores = tasks.score(task, said, items)
    kept = general(model, tokenizer, test_items)
    return {
        **{name.replace("_", " "): value for name, value in scores.items()},
        "held-out answer loss": answer_loss(model, tokenizer, items),
        "parroting": parroting(said, items),
        "facts kept": kept["facts"],
        "story perplexity": kept["story_perplexity"],
    }


def run(quick: bool) -> list[dict]:
    """Rows: answers only (value) against every token (peer_value), mean and standard deviation over the seeds."""
    seeds, settings, test_items = (range(2), ["answer"], 20) if quick else (range(5), list(SETTINGS), 200)
    rows = []
    for setting in settings:
        runs = {mask: [one_run(setting, mask, seed, test_items) for seed in seeds] for mask in ("completion", "all")}
        for metric in runs["all"][0]:
            for what, summary in (("", mean), (", standard deviation", stdev)):
                mine, peer = (summary(run[metric] for run in runs[mask]) for mask in ("completion", "all"))
                unit = "nats" if "loss" in metric else "1"
                rows.append({"name": f"{setting}: {metric}{what}", "value": mine, "unit": unit, "peer": PEER,
                             "peer_value": peer, "ratio": None, "goal": None})  # fmt: skip
    return rows
