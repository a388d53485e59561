"""Bench `packing`: how much of the work is real tokens, what a step costs, and whether packed samples stay apart.

Lengths are lognormal, mean 200, at most 1,024 tokens. Efficiency is real tokens / computed tokens, five draws.
The step (forward and backward of all parameters, fp32, one thread) handles the same documents in every contestant:
- padded: random batches of eight, as a data loader makes them; sorted: batches of eight of similar length
- library packing: rows of TRL's bfd, one at a time, position ids, transformers' sdpa (a dense block-diagonal mask)
- ours: rows of `methods.packing.best_fit`, attention inside each document, through transformers' AttentionInterface
Contamination is measured on the tiny model with real tickets: the largest change of a logit against the ticket alone.
"""

import math
import random
import time
from statistics import mean

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import pack_dataset

from finetune_lab.lab import models, tasks
from finetune_lab.lab.meter import interleaved_seconds, median_ratio, one_thread
from finetune_lab.lab.packed import packed_batches, use_document_attention
from finetune_lab.lab.train import collate, encode
from finetune_lab.methods.packing import best_fit, token_efficiency

NAME = "packing"
HELP = "packing against padding: token efficiency, step time, contamination; ours against TRL and transformers"

WIDTH, BATCH = 1024, 8
FULL = {"documents": 4000, "draws": 5, "step documents": 64, "layers": 4, "rounds": 3,
        "goals": (">= 0.999", ">= 2.9", ">= 1.3")}  # fmt: skip
QUICK = {"documents": 400, "draws": 2, "step documents": 12, "layers": 1, "rounds": 2,  # fewer rows: the last weighs more
         "goals": (">= 0.98", ">= 1.5", ">= 1.1")}  # fmt: skip


def lengths_of(count: int, seed: int) -> list[int]:
    """Lognormal lengths in tokens: mean 200 (sigma 0.8), at most WIDTH."""
    draw = random.Random(seed)
    return [min(WIDTH, max(1, round(draw.lognormvariate(math.log(200) - 0.32, 0.8)))) for _ in range(count)]


def in_batches(order: list[int]) -> list[list[int]]:
    return [order[i : i + BATCH] for i in range(0, len(order), BATCH)]


def as_data_set(lengths: list[int]) -> Dataset:
    """Documents of these lengths; every token is the number of its document."""
    return Dataset.from_dict({"input_ids": [[i] * n for i, n in enumerate(lengths)]})


def trl_pack(documents: Dataset, strategy: str) -> Dataset:
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        return pack_dataset(documents, WIDTH, strategy)
    finally:
        if shown:
            enable_progress_bars()


def trl_rows(lengths: list[int], strategy: str) -> list[list[int]]:
    """Which documents share a row of `trl.pack_dataset`; wrapped: a document that is cut is in two rows."""
    return [list(dict.fromkeys(row)) for row in trl_pack(as_data_set(lengths), strategy)["input_ids"]]


def plans(lengths: list[int], seed: int) -> dict[str, tuple[float, int]]:
    """Name -> (token efficiency, documents that were cut)."""
    random_order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    grouped = get_length_grouped_indices(lengths, BATCH, generator=torch.Generator().manual_seed(seed))
    found = {
        "padded, random batches": (token_efficiency(lengths, in_batches(random_order)), 0),
        "padded, grouped by length": (token_efficiency(lengths, in_batches(grouped)), 0),
        "ours, best fit": (token_efficiency(lengths, best_fit(lengths, WIDTH), WIDTH), 0),
        "TRL bfd": (token_efficiency(lengths, trl_rows(lengths, "bfd"), WIDTH), 0),
    }
    wrapped = trl_rows(lengths, "wrapped")
    cut = sum(map(len, wrapped)) - len(lengths)
    found["TRL wrapped"] = (sum(lengths) / (len(wrapped) * WIDTH), cut)
    return found


def efficiency_rows(size: dict) -> list[dict]:
    drawn = [lengths_of(size["documents"], seed) for seed in range(size["draws"])]
    found = [plans(lengths, seed) for seed, lengths in enumerate(drawn)]
    rows = []
    for name in found[0]:
        share, base = (mean(plan[n][0] for plan in found) for n in (name, "padded, random batches"))
        rows.append({"name": f"token efficiency: {name}", "value": share, "unit": "real/computed tokens",
                     "peer": "padded, random batches", "peer_value": base,
                     "goal": size["goals"][0] if name.startswith("ours") else None})  # fmt: skip
    cut = mean(plan["TRL wrapped"][1] for plan in found) / size["documents"]
    rows.append({"name": "documents cut in two: TRL wrapped", "value": cut, "unit": "share of the documents",
                 "peer": "ours, best fit", "peer_value": 0.0})  # fmt: skip
    spare = mean(len(best_fit(lengths, WIDTH)) - math.ceil(sum(lengths) / WIDTH) for lengths in drawn)
    rows.append({"name": "rows more than the tokens need: ours, best fit", "value": spare, "unit": "rows"})
    documents = as_data_set(drawn[0])
    packers = {"ours": lambda: best_fit(drawn[0], WIDTH), "trl": lambda: trl_pack(documents, "bfd")}
    seconds = {name: [timed(pack) for _ in range(3)] for name, pack in packers.items()}
    rows.append({"name": f"seconds to pack {size['documents']} documents: ours, best fit", "value": min(seconds["ours"]),
                 "unit": "s", "peer": "TRL bfd, which joins the tokens too", "peer_value": min(seconds["trl"]),
                 "ratio": min(seconds["trl"]) / min(seconds["ours"])})  # fmt: skip
    return rows


def timed(fn) -> float:
    start = time.process_time()
    fn()
    return time.process_time() - start


def step_batches(lengths: list[int], vocab: int) -> dict[str, list[dict]]:
    """Contestant -> the batches that hold every document once; first label -100, so that all losses count the same."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]
    rows = [(ids, [-100, *ids[1:]]) for ids in documents]
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    padded, by_length = in_batches(order), in_batches(sorted(order, key=lambda i: lengths[i]))
    return {
        "padded": [collate([rows[i] for i in batch], 0) for batch in padded],
        "sorted": [collate([rows[i] for i in batch], 0) for batch in by_length],
        "library packing": packed_batches(rows, trl_rows(lengths, "bfd")),
        "ours": packed_batches(rows, best_fit(lengths, WIDTH)),
    }


def steps_of(size: dict, vocab: int = 1792) -> dict[str, object]:
    """Contestant -> a function that does one step over all documents and returns the mean loss of a labelled token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=256, intermediate_size=704, num_hidden_layers=size["layers"],
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=WIDTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    batches = step_batches(lengths_of(size["step documents"], 0), vocab)
    labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches["ours"])

    def step(name: str):
        def run() -> float:
            if name == "ours":
                use_document_attention(model)
            else:
                model.set_attn_implementation("sdpa")
            model.zero_grad()
            total = 0.0
            for batch in batches[name]:
                loss = model(**batch, use_cache=False, num_items_in_batch=labelled).loss
                loss.backward()
                total += loss.item()
            return total

        return run

    return {name: step(name) for name in batches}


def step_rows(size: dict) -> list[dict]:
    steps = steps_of(size)
    losses = {}
    kept = {name: lambda name=name: losses.update({name: steps[name]()}) for name in steps}
    seconds = interleaved_seconds(kept, size["rounds"])
    middle = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    goals = {"padded": size["goals"][1], "sorted": None, "library packing": size["goals"][2]}
    rows = [{"name": f"step time: ours against {peer}", "value": middle["ours"], "unit": "s", "peer": peer,
             "peer_value": middle[peer], "ratio": median_ratio(seconds, peer, "ours"), "goal": goal}
            for peer, goal in goals.items()]  # fmt: skip
    worst = max(abs(loss - losses["padded"]) / losses["padded"] for loss in losses.values())
    rows.append({"name": "relative difference of the step's loss, all four", "value": worst, "unit": "1",
                 "peer": "padded", "peer_value": losses["padded"], "goal": "<= 1e-05"})  # fmt: skip
    return rows


@torch.no_grad()
def isolation_rows() -> list[dict]:
    """Largest change of a logit against each ticket alone, four tickets in a row of the tiny model."""
    model, tokenizer = models.load("tiny")
    samples = encode(tokenizer, tasks.load_task("extract", "train", 4))
    (batch,) = packed_batches(samples, [range(4)])
    ids, positions = batch["input_ids"], batch["position_ids"]
    alone = torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row, _ in samples])
    ways = {
        "position ids, no mask (sdpa)": ("sdpa", {"position_ids": positions}, "<= 0.0001"),
        "position ids, no mask (eager)": ("eager", {"position_ids": positions}, "<= 0.0001"),
        "position ids, document attention (ours)": ("ours", {"position_ids": positions}, "<= 0.0001"),
        "position ids and a mask of ones": (
            "sdpa", {"position_ids": positions, "attention_mask": torch.ones_like(ids)}, ">= 0.1",
        ),
        "position ids, no mask, use_cache=True": ("sdpa", {"position_ids": positions, "use_cache": True}, ">= 0.1"),
        "no position ids": ("sdpa", {}, ">= 0.1"),
    }  # fmt: skip
    rows = []
    for name, (attention, inputs, goal) in ways.items():
        use_document_attention(model) if attention == "ours" else model.set_attn_implementation(attention)
        logits = model(input_ids=ids, **{"use_cache": False, **inputs}).logits[0]
        rows.append({"name": f"largest change of a logit: {name}", "value": float((logits - alone).abs().max()),
                     "unit": "logit", "peer": "each ticket alone", "peer_value": 0.0, "goal": goal})  # fmt: skip
    return rows


@one_thread()
def run(quick: bool) -> list[dict]:
    """All rows, on one thread; `quick` takes fewer documents, one layer and its own, lower goals."""
    size = QUICK if quick else FULL
    return [*efficiency_rows(size), *isolation_rows(), *step_rows(size)]
