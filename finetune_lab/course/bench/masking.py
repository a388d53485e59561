"""Bench `masking`: the right labels against two others, on the tiny model, five seeds.

"every token" counts the prompt too; "ends masked" is what `pad_token = the end of turn` does to labels that are masked
by comparing ids with the padding token. Both sides see the same items in the same order and take the same steps; only the labels differ. Each row is a mean
over the seeds, with its standard deviation in a row of its own. No goals: whatever comes out is what the lesson says.
"""

import functools
from statistics import mean, stdev

import torch

from finetune_lab.lab import generate, tasks, train
from finetune_lab.lab.evaluate import general
from finetune_lab.lab.models import load
from finetune_lab.lab.tiers import TINY
from finetune_lab.methods.chat import IGNORE_INDEX, chat_format, completion_labels, text_encoder
from finetune_lab.methods.loss import sft_loss

NAME = "masking"
HELP = "right labels against every token, and against masked ends of turn: what each teaches, five seeds"

# name -> task, training items, steps. Eight tickets and 15 steps: where samples are few
SETTINGS = {"answer": ("answer", 500, 100), "extract": ("extract", 200, 30), "extract, 8 items": ("extract", 8, 15)}
COMPARED = [
    ("answer", "every token"), ("extract", "every token"), ("extract, 8 items", "every token"),
    ("answer", "ends masked"), ("extract", "ends masked"),
]  # fmt: skip
MOST = 64  # tokens an answer may have, for both sides


def ends_masked(tokenizer):
    """Labels of the answer with every end-of-turn label gone, as a collator makes them where it is the padding token."""
    end = chat_format(tokenizer).end[-1]

    def labels(prompt_ids: list[int], ids: list[int]) -> list[int]:
        return [IGNORE_INDEX if label == end else label for label in completion_labels(prompt_ids, ids)]

    return labels


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


@functools.cache
def one_run(setting: str, mask: str, seed: int, test_items: int) -> dict[str, float]:
    """Fine-tune the tiny model once and measure it on held-out items. mask: "answers", "every token", "ends masked"."""
    task, count, steps = SETTINGS[setting]
    recipe = TINY.recipes[task]
    model, tokenizer = load("tiny", seed=seed)
    rules = {"answers": "completion", "every token": "all", "ends masked": ends_masked(tokenizer)}
    model = train.add_lora(model, recipe.rank, seed=seed)
    train.sft(
        model, tokenizer, tasks.load_task(task, "train", count, seed), steps=steps,
        batch_size=recipe.batch_size, lr=recipe.lora_lr, seed=seed, mask=rules[mask],
    )  # fmt: skip
    items = tasks.load_task(task, "test", test_items)
    said = generate.answer(model, tokenizer, [i["prompt"] for i in items], max_new_tokens=MOST)
    encode = text_encoder(tokenizer)
    return {
        "exact match": tasks.score(task, said, items)["exact_match"],
        "tokens an answer": mean(len(encode(text)) for text in said),
        "held-out answer loss": answer_loss(model, tokenizer, items),
        "parroting": parroting(said, items),
        "story perplexity": general(model, tokenizer, test_items)["story_perplexity"],
    }


UNITS = {"held-out answer loss": "nats", "tokens an answer": "tokens"}


def run(quick: bool) -> list[dict]:
    """Rows: the right labels (value) against other ones (peer_value), mean and standard deviation over the seeds."""
    seeds, compared, test_items = (range(2), COMPARED[:1], 20) if quick else (range(5), COMPARED, 200)
    rows = []
    for setting, peer in compared:
        runs = {mask: [one_run(setting, mask, seed, test_items) for seed in seeds] for mask in ("answers", peer)}
        for metric in runs[peer][0]:
            for what, summary in (("", mean), (", standard deviation", stdev)):
                mine, other = (summary(run[metric] for run in runs[mask]) for mask in ("answers", peer))
                rows.append({"name": f"{setting}, against {peer}: {metric}{what}", "value": mine,
                             "unit": UNITS.get(metric, "1"), "peer": peer, "peer_value": other,
                             "ratio": None, "goal": None})  # fmt: skip
    return rows
