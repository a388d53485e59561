"""Memory questions with one number as the answer, from the estimator: the figures behind the drills of lesson 02.

Each takes plain words and numbers and gives bytes or a count. Models are named as in `presets.PRESETS`, cards as in `GPUS`.
Leaves out: everything that `estimate` leaves out. In production: `finetune-lab vram MODEL --json`.
"""

from finetune_lab.methods.memory.architecture import from_config
from finetune_lab.methods.memory.estimate import estimate
from finetune_lab.methods.memory.fit import largest_batch
from finetune_lab.methods.memory.ledger import Ledger
from finetune_lab.methods.memory.presets import GIB, GPUS, PRESETS
from finetune_lab.methods.memory.recipe import Recipe
from finetune_lab.methods.memory.states import Tensor, state_bytes


def _ledger(model: str, **recipe) -> Ledger:
    return estimate(from_config(PRESETS[model], model), Recipe(**recipe))


def peak_bytes(model: str, method: str, seq: int, **recipe) -> int:
    """Bytes at the peak of one step, without the CUDA context."""
    return _ledger(model, method=method, seq=seq, **recipe).peak


def standing_bytes(model: str, method: str, rank: int) -> int:
    """Bytes that are there in every step, before any activation: weights with their constants, adapters, gradients, states."""
    ledger = _ledger(model, method=method, rank=rank)
    kept = ("weights", "quantisation state", "adapters", "gradients", "master weights", "optimizer")
    return sum(ledger.total(category) for category in kept)


def saved_by(model: str, method: str, seq: int, lever: str, value: object) -> int:
    """Bytes by which the peak falls when the field `lever` of the recipe becomes `value`."""
    return peak_bytes(model, method, seq) - peak_bytes(model, method, seq, **{lever: value})


def optimizer_bytes(parameters: float, optimizer: str) -> int:
    """State of one large weight matrix with fp32 parameters (`states.state_bytes`)."""
    tensor = Tensor("weight", (int(parameters),), 4, trained=True)
    return state_bytes(tensor, Recipe(method="full", dtype="fp32", optimizer=optimizer))


def saved_per_layer(model: str, tokens: int) -> int:
    """Bytes that one layer keeps for backward: full fine-tuning in bf16, sdpa attention, so many tokens in one batch."""
    one, two = (_layers(model, tokens, layers) for layers in (1, 2))
    return two - one


def _layers(model: str, tokens: int, layers: int) -> int:
    config = PRESETS[model] | {"num_hidden_layers": layers}
    return estimate(from_config(config, model), Recipe(method="full", seq=tokens)).total("activations")


def most_sequences(model: str, seq: int, gpu: str, checkpointing: bool) -> int:
    """The largest batch of QLoRA that fits on a card."""
    recipe = Recipe(method="qlora", seq=seq, checkpointing=checkpointing)
    return largest_batch(from_config(PRESETS[model], model), recipe, GPUS[gpu])


def logits_at_the_peak(model: str, seq: int) -> int:
    """Bytes of logits-sized tensors at their fullest moment: LoRA in bf16, one sequence, the loss of transformers."""
    return max(alive.get("logits", 0) for _, alive in _ledger(model, seq=seq).timeline())


def from_gib(gib: float) -> float:
    """GiB (2^30 bytes, torch and nvidia-smi) in bytes."""
    return gib * GIB
