"""What a lesson needs of the model it runs on, in one place: sizes, steps, learning rates. No `if` in cells.

`tier()` reads the model's name (argument, $FINETUNE_LAB_MODEL, else "tiny") and returns the settings of its class:
the embedded model, a real model on a laptop CPU, or anything larger. The tiny figures are those that
`finetune-lab bench world` measures; those of the other tiers are starting points, chosen to end in minutes.
"""

import os
from dataclasses import dataclass

from .tasks import load_task


@dataclass(frozen=True)
class Recipe:
    """How a lesson fine-tunes: optimizer steps, sequences a step, peak learning rates, LoRA rank, training items."""

    steps: int
    batch_size: int
    lora_lr: float
    full_lr: float
    rank: int = 16
    items: int = 1600


@dataclass(frozen=True)
class Tier:
    """Settings of a class of models. `test_items`: how many held-out items a lesson scores; `instruction` is put
    before the user's text, for models that can read one (the tiny model learns the task from its examples alone);
    `grid`: points on a side where a lesson maps a loss over a plane."""

    name: str
    recipes: dict[str, Recipe]
    test_items: int
    instruction: dict[str, str]
    grid: int = 9

    def items(self, task: str, split: str, n: int, seed: int = 0) -> list[dict]:
        """`n` items of a task (`tasks.load_task`), with this tier's instruction before the user's text."""
        text = self.instruction.get(task, "")
        if not text:
            return load_task(task, split, n, seed)
        return [_instructed(item, text) for item in load_task(task, split, n, seed)]


def _instructed(item: dict, text: str) -> dict:
    *before, last = item["prompt"]
    return item | {"prompt": [*before, last | {"content": text + last["content"]}]}


TINY = Tier(
    name="tiny",
    recipes={
        "extract": Recipe(steps=100, batch_size=16, lora_lr=2e-3, full_lr=5e-4),
        "answer": Recipe(steps=100, batch_size=16, lora_lr=2e-3, full_lr=5e-4, items=500),
        "math": Recipe(steps=300, batch_size=16, lora_lr=1e-3, full_lr=3e-4, items=4000),
        "reply": Recipe(steps=60, batch_size=8, lora_lr=4e-3, full_lr=1.5e-3, items=600),
        "dpo": Recipe(steps=24, batch_size=8, lora_lr=1e-3, full_lr=1e-4, items=400),
        # for beta 0.1 and weights that have learnt already: an adapter that goes on, or the whole model
        "dpo-start": Recipe(steps=40, batch_size=8, lora_lr=1e-4, full_lr=3e-5, items=400),
    },
    test_items=200,
    instruction={},
)
_ASK = {
    "extract": "Write the ticket as one line of JSON with the keys order, product, issue, action.\n",
    "answer": "Answer like this: It is red. ",
    "math": "Answer like this: It is 19. ",
    "reply": "Answer this letter to a lighting shop in two or three sentences.\n",
}
SMALL = Tier(
    name="small",
    recipes={
        task: Recipe(steps=40, batch_size=4, lora_lr=1e-3, full_lr=1e-4, items=500)
        for task in ("extract", "answer", "math", "reply")
    }
    | dict.fromkeys(("dpo", "dpo-start"), Recipe(steps=40, batch_size=4, lora_lr=5e-5, full_lr=5e-6, items=200)),
    test_items=20,
    instruction=_ASK,
    grid=5,
)
LARGE = Tier(
    name="large",
    recipes={
        task: Recipe(steps=100, batch_size=8, lora_lr=2e-4, full_lr=1e-5, items=500)
        for task in ("extract", "answer", "math", "reply")
    }
    | dict.fromkeys(("dpo", "dpo-start"), Recipe(steps=100, batch_size=8, lora_lr=5e-6, full_lr=5e-7, items=500)),
    test_items=100,
    instruction=_ASK,
    grid=5,
)


def tier(model: str | None = None) -> Tier:
    """The tier of a model's name: "tiny", "smollm2-135m", else large (a hub id or a folder)."""
    name = model or os.environ.get("FINETUNE_LAB_MODEL") or "tiny"
    return {"tiny": TINY, "smollm2-135m": SMALL}.get(name, LARGE)
