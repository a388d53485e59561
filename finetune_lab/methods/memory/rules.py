"""What the usual rules of thumb say, so that the ledger can be put beside them. All return bytes.

16 bytes a parameter: ZeRO 1910.02054, section 3.1. Activations: Korthikanti et al. 2205.05198, eq. 1. The notes' rules
are those of common course material. Each leaves out something: temporaries, logits, fp32 adapters, the moment.
"""

from finetune_lab.methods.memory.architecture import Architecture
from finetune_lab.methods.memory.recipe import Recipe
from finetune_lab.methods.memory.states import tensors


def sixteen_bytes(architecture: Architecture, recipe: Recipe) -> int:
    """Full: 16 P. Adapters: 2 P (0.5 P quantised) for the base and 16 for each adapter parameter. No activations."""
    trained = sum(t.copies * t.numel for t in tensors(architecture, recipe) if t.trained)
    if not recipe.adapts:
        return 16 * trained
    base = architecture.parameters()
    return (base // 2 if recipe.quantised else 2 * base) + 16 * trained


def notes(architecture: Architecture, recipe: Recipe) -> int:
    """The above and 2 b s h L: one 16-bit copy of each layer's input, whatever the recipe."""
    kept = 2 * recipe.batch * recipe.seq * architecture.hidden * architecture.layers
    return sixteen_bytes(architecture, recipe) + kept


def korthikanti(architecture: Architecture, recipe: Recipe) -> int:
    """16 bytes a parameter and, for each layer, s b h (34 + 5 a s / h); 34 without the attention matrix; 2 checkpointed."""
    tokens, a = recipe.batch * recipe.seq, architecture
    if recipe.checkpointing:
        layer = 2 * tokens * a.hidden
    else:
        scores = 5 * a.heads * recipe.seq * tokens if recipe.attention == "eager" else 0
        layer = 34 * tokens * a.hidden + scores
    return sixteen_bytes(architecture, recipe) + a.layers * layer
