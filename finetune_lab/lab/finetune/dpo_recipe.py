"""The recipe of preference training: which loss, against which reference, and the adapter that it goes on from.

DPO begins where supervised fine-tuning ended, and measures against that beginning. Two ways to say so:

    adapter: runs/sft-...      the adapter of that run goes on training; a frozen copy of it is the reference
    model: runs/sft-.../model  a whole model; a new adapter goes on top, and the reference is that model without it

With `adapter` the result is one adapter on the same base: it fits wherever the first one did, and nothing has to be
merged. Rank, alpha, targets and method are the adapter's own. In production: `trl dpo --config`, which copies the
adapter the same way.
"""

from dataclasses import dataclass, replace

from finetune_lab.errors import UserError
from finetune_lab.lab import tiers
from finetune_lab.lab.finetune import runs
from finetune_lab.lab.finetune.recipe import METHODS, Recipe
from finetune_lab.lab.finetune.settings import setting

PAIRED = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm")


@dataclass(frozen=True, kw_only=True)
class DpoRecipe(Recipe):
    """Preference training: which loss, against which reference, and the adapter that it goes on from."""

    task: str | None = setting(None, "text", "the pairs of the course instead of data", choices=("reply",))
    adapter: str | None = setting(
        None, "text", "the run (or adapter) that goes on training; a frozen copy of it is the reference"
    )
    loss: str | None = setting(
        None, "text", "sigmoid is DPO; kto takes labels instead of pairs (default: by the data)",
        choices=(*PAIRED, "kto"),
    )  # fmt: skip
    beta: float = setting(0.1, "number", "how tightly the reference holds; in ipo it is the paper's tau", above=0)
    label_smoothing: float = setting(
        0.0, "number", "robust: share of pairs that may be the wrong way round", least=0, below=0.5
    )
    desirable_weight: float = setting(1.0, "number", "kto: weight of the good answers", above=0)
    undesirable_weight: float = setting(1.0, "number", "kto: weight of the bad answers", above=0)
    reference: str | None = setting(
        None, "text", "log-probabilities of the reference: at each step, or all before training (default: live; full: precomputed)",
        choices=("live", "precomputed"),
    )  # fmt: skip
    epochs: float | None = setting(
        None, "number", "passes over the data, instead of steps (default: 1)", above=0, such_as=1
    )
    method: str | None = setting(None, "text", "what is trained (default: as in adapter, else lora)", choices=METHODS)
    rank: int | None = setting(None, "count", "rank r of the adapter (default: as in adapter, else 16)", least=1)
    targets: tuple[str, ...] | None = setting(
        None, "names", "layers with an adapter, by name, or all-linear (default: as in adapter, else all-linear)"
    )
    EPOCHS = 1.0

    def __post_init__(self):
        if self.loss == "dpo":
            raise UserError("loss is 'dpo': the loss of DPO is called sigmoid here, as in TRL. Give sigmoid.")
        place = runs.find_adapter(self.adapter) if isinstance(self.adapter, str) else None
        if place and self.model is None:
            object.__setattr__(self, "model", runs.base_of(place))
        super().__post_init__()
        inherited = runs.settings_of(place) if place else {"method": "lora", "rank": 16, "targets": ("all-linear",)}
        for name, value in inherited.items():
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, value)
            elif place and given != value:
                raise UserError(
                    f"{name} is {given!r}, but the adapter in {self.adapter} has {value!r}, and it is the one that goes "
                    f"on training: leave {name} away."
                )
        if place and runs.base_of(place) != self.model:
            raise UserError(
                f"{self.adapter} was trained on {runs.base_of(place)}, not on {self.model}: leave model away."
            )
        if self.dropout:
            raise UserError(
                "dropout is for `sft`: in preference training policy and reference must be the same network. Leave it away."
            )
        if self.method == "full" and self.reference is None:
            object.__setattr__(self, "reference", "precomputed")
        if self.method == "full" and self.reference == "live":
            raise UserError("reference live needs an adapter to switch off: with method full it is precomputed.")
        if self.label_smoothing and self.loss != "robust":
            raise UserError(
                f"label_smoothing does nothing in loss {self.loss or 'sigmoid'} (TRL 1.16 drops it without a word): use "
                "loss robust, or leave it away."
            )

        if self.loss == "robust" and not self.label_smoothing:
            raise UserError(
                "loss robust without label_smoothing is plain DPO: give the share of pairs that may be the wrong way "
                "round, such as label_smoothing 0.1, or use sigmoid."
            )
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) != 1 and self.loss not in (None, "kto"):  # None: asked again once the data is read
                raise UserError(f"{name} does nothing in loss {self.loss}: use loss kto, or leave it away.")

    def kind(self) -> str:
        """The row of `lab.tiers`: a new adapter (B = 0) takes a higher rate than weights that have learnt already."""
        return "dpo-start" if self.adapter or self.method == "full" else "dpo"

    def after_a_start(self) -> "DpoRecipe":
        """This recipe on the tiny model as it will be once the adapter that goes on training is made."""
        usual = tiers.TINY.recipes["dpo-start"]
        fill = {"lr": usual.lora_lr, "batch_size": usual.batch_size, "items": usual.items}
        if self.steps is None and self.epochs is None:
            fill["steps"] = usual.steps
        fill["out"] = f"runs/{self.name()}"
        return replace(self, **{name: value for name, value in fill.items() if getattr(self, name) is None})

    def usual(self, tier: tiers.Tier) -> tiers.Recipe:
        """Preference training has rates of its own, whatever the data."""
        return tier.recipes[self.kind()]
