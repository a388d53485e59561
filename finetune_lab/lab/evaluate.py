"""Score a model on the tasks, and on what the base model knew: facts, sums and stories in plain text."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .generate import answer, complete
from .tasks import load_task, score

LONGEST_ANSWER = {"extract": 48, "answer": 16, "math": 8, "reply": 64}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    n: int = 200,
    split: str = "test",
    seed: int = 0,
) -> dict[str, float]:
    """Greedy scores of a chat task on `n` items of a split, as `tasks.score` gives them."""
    items = load_task(task, split, n, seed)
    said = answer(model, tokenizer, [i["prompt"] for i in items], max_new_tokens=LONGEST_ANSWER[task])
    return score(task, said, items)


def general(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int = 200, seed: int = 0
) -> dict[str, float]:
    """The forgetting meter, in plain text without the chat template: `n` items of each kind.

    facts: share of first sentences about a town completed with the right value; sums: share of unseen sums completed
    with the right number; story_perplexity: exp of the mean negative log likelihood a token of unseen stories.
    """
    items = load_task("general", "test", 4 * n, seed)
    kinds = {kind: [i for i in items if i["kind"] == kind][:n] for kind in ("fact", "sum", "story")}
    out = {}
    for kind, name in (("fact", "facts"), ("sum", "sums")):
        rows = [_plain(tokenizer, i["start"]) for i in kinds[kind]]
        made = tokenizer.batch_decode(complete(model, tokenizer, rows, max_new_tokens=8), skip_special_tokens=True)
        right = [_first(text, kind) == i["answer"] for text, i in zip(made, kinds[kind], strict=True)]
        out[name] = sum(right) / n
    return out | {"story_perplexity": perplexity(model, tokenizer, [i["text"] for i in kinds["story"]])}


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer.encode(text, add_special_tokens=False)


def _first(text: str, kind: str) -> str:
    """What was said up to the end of the sentence (facts) or of the line (sums)."""
    return text.split("." if kind == "fact" else "\n")[0].strip()


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> float:
    """exp(mean negative log likelihood a token) of plain texts, the first token given."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    rows = sorted((_plain(tokenizer, text) for text in texts), key=len)
    for first in range(0, len(rows), batch_size):
        chosen = rows[first : first + batch_size]
        width = max(map(len, chosen))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in chosen], device=model.device)
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in chosen], device=model.device)
        logits = model(input_ids=ids, attention_mask=(labels != -100).long()).logits
        total += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    model.train(training)
    return math.exp(total / count)
