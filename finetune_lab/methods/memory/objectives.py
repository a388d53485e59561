"""Beyond supervised fine-tuning: how many sequences a step sees, and which other models and caches stand beside it.

DPO 2305.18290 and reward models run chosen and rejected in one batch; PPO (InstructGPT, 2203.02155) holds four models;
GRPO 2402.03300 rolls out several answers a prompt. Derived from the objectives and from TRL's order of calls, on top of
the proved accounting of one forward and backward pass. DPO is held to a real step written in torch (0.6 to 1.4 % above
at 64 tokens: its loss drops the last position before the logits are copied); no run of TRL stands behind the others.
Leaves out: vLLM engines beside the trainer, a reward model that is served elsewhere, sampling's own temporaries.
"""

from collections.abc import Callable

from finetune_lab.methods.memory.architecture import Architecture
from finetune_lab.methods.memory.ledger import Line
from finetune_lab.methods.memory.recipe import DTYPES, Recipe


def sequences(recipe: Recipe) -> int:
    """Sequences in one forward pass: a pair is two, a GRPO prompt is `generations`."""
    if recipe.objective in ("dpo", "reward"):
        return 2 * recipe.batch
    return recipe.batch * (recipe.generations if recipe.objective == "grpo" else 1)


def kv_cache(architecture: Architecture, recipe: Recipe) -> int:
    """Keys and values of all rollouts at full length, in the base's dtype."""
    tokens = sequences(recipe) * recipe.seq
    return 2 * tokens * architecture.kv_width * architecture.layers * DTYPES[recipe.dtype]


def beside(architecture: Architecture, recipe: Recipe, trained: dict[str, int]) -> list[Line]:
    """Models that stay beside the policy: reference, reward and value model.

    trained: bytes of the policy by category; the value model is trained the same way, so it costs the same again.
    """
    weights = trained.get("weights", 0) + trained.get("quantisation state", 0)
    lines = []
    if recipe.reference == "separate":
        lines.append(Line("reference model", "weights", weights, "the frozen base once more"))
    if recipe.objective == "ppo":
        lines.append(Line("other models", "reward model", weights, "a frozen model of the policy's size"))
        lines.append(Line("other models", "value model", sum(trained.values()), "trained as the policy is: all of it"))
    return lines


def rollout_moments(architecture: Architecture, recipe: Recipe) -> list[tuple[str, dict[str, int]]]:
    """What generation needs beside the models: the cache, and the logits of one position in fp32."""
    if recipe.objective not in ("ppo", "grpo"):
        return []
    logits = 4 * sequences(recipe) * architecture.vocab
    return [("rollout", {"KV cache": kv_cache(architecture, recipe), "logits": logits})]


def reference_moments(recipe: Recipe, forward: dict[str, int], frozen: Callable[[], dict[str, int]]) -> list:
    """The reference's own forward pass, while the policy's activations wait for backward (TRL's order of calls)."""
    if recipe.objective not in ("dpo", "ppo", "grpo") or recipe.reference not in ("separate", "adapter-off"):
        return []
    extra = frozen()
    return [("forward of the reference", {k: forward.get(k, 0) + extra.get(k, 0) for k in forward | extra})]
