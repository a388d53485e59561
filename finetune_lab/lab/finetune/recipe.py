"""The recipe of a run: a YAML file, flags over it, and a checked dataclass. Every bad value is one clear sentence.

    recipe = load(SftRecipe, "tickets.yaml", {"lr": "1e-4"})
    recipe = recipe.completed(parameters=135_000_000)       # fills what was left open, by method and size

PyYAML reads `1e-4` as a string (YAML 1.1 wants `1.0e-4`); numbers are therefore read from text too. What is left out:
lists of recipes, sweeps, interpolation. In production: `trl.TrlParser`, axolotl's and LLaMA-Factory's YAML files.
"""

import dataclasses
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import yaml

from finetune_lab.errors import UserError
from finetune_lab.lab import tiers
from finetune_lab.lab.finetune.settings import checked, setting
from finetune_lab.lab.tiers import LARGE, SMALL, TINY, Tier

METHODS = ("lora", "dora", "qlora", "full")
# What other tools call our settings.
ELSEWHERE = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "max_steps": "steps", "max_seq_length": "max_length",
    "cutoff_len": "max_length", "sequence_len": "max_length", "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size", "gradient_accumulation_steps": "accumulation", "warmup_ratio": "warmup",
    "warmup_steps": "warmup", "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "max_grad_norm": "clip",
    "gradient_checkpointing": "checkpointing", "lora_r": "rank", "r": "rank", "lora_alpha": "alpha",
    "lora_dropout": "dropout", "target_modules": "targets", "lora_target_modules": "targets", "base_model": "model",
    "model_name_or_path": "model", "dataset": "data", "train_file": "data", "output_dir": "out", "val_set_size": "hold_out",
    "neftune_noise_alpha": "neftune", "bf16": "precision", "fp16": "precision",
    "loss_type": "loss", "pref_loss": "loss", "pref_beta": "beta", "dpo_beta": "beta", "ref_model": "adapter",
    "adapter_name_or_path": "adapter", "precompute_ref_log_probs": "reference",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every trainer needs. None means: decided by `completed`, from the method, the size and the data."""

    model: str | None = setting(
        None, "text", "tiny, smollm2-135m, a hub id (owner/name) or a folder (default: $FINETUNE_LAB_MODEL or tiny)"
    )
    data: str | None = setting(None, "text", "your JSONL, or a hub data set (owner/name or owner/name:split)")
    task: str | None = setting(
        None, "text", "a task of the course instead of data", choices=("extract", "answer", "math", "reply")
    )
    split: str = setting(
        "test", "text", "what a task is scored on: new combinations in new words, or in known words",
        choices=("test", "combinations"),
    )  # fmt: skip
    valid: str | None = setting(None, "text", "JSONL that is only scored, never trained on")
    hold_out: float = setting(0.0, "number", "share of data kept for scoring when there is no valid", least=0, below=1)
    items: int | None = setting(None, "count", "use only the first so many rows", least=1)
    special_tokens: str = setting(
        "error", "text", "control tokens inside your texts: refuse, or write apart", choices=("error", "escape")
    )
    method: str = setting("lora", "text", "what is trained", choices=METHODS)
    rank: int = setting(16, "count", "rank r of the adapter", least=1)
    alpha: float | None = setting(
        None, "number", "adapter scale is alpha / rank (default: 2 rank)", above=0, such_as=32
    )
    dropout: float = setting(0.0, "number", "dropout before the adapter", least=0, below=1)
    targets: tuple[str, ...] = setting(("all-linear",), "names", "layers with an adapter, by name, or all-linear")
    lr: float | None = setting(
        None, "number", "peak learning rate (default: by method and model size)", above=0, such_as="2e-4"
    )
    steps: int | None = setting(None, "count", "optimizer steps", least=1)
    epochs: float | None = setting(
        None, "number", "passes over the data, instead of steps (default: 3)", above=0, such_as=3
    )
    batch_size: int | None = setting(None, "count", "sequences in one forward pass of one process", least=1)
    accumulation: int = setting(1, "count", "forward passes that add up to one optimizer step", least=1)
    warmup: float = setting(0.1, "number", "warm-up: steps, or below 1 a share of all steps", least=0)
    schedule: str = setting(
        "linear", "text", "how the rate falls after the warm-up",
        choices=("linear", "cosine", "constant_with_warmup"),
    )  # fmt: skip
    weight_decay: float = setting(0.0, "number", "weight decay of AdamW", least=0)
    clip: float = setting(1.0, "number", "largest norm of the gradient; 0 switches clipping off", least=0)
    optimizer: str = setting(
        "adamw_torch", "text", "optimizer", choices=("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor")
    )
    max_length: int | None = setting(None, "count", "longest sequence in tokens; the rest is cut", least=8)
    precision: str | None = setting(
        None, "text", "compute in (default: bf16 on a GPU that can, else fp32)", choices=("fp32", "bf16", "fp16")
    )
    checkpointing: bool = setting(False, "switch", "recompute activations in the backward pass: less memory, slower")
    save_every: int | None = setting(None, "count", "steps between checkpoints (default: a tenth of the run)", least=1)
    test_items: int | None = setting(None, "count", "rows scored before and after; 0 scores nothing", least=0)
    seed: int = setting(0, "count", "seed of data order, adapter and dropout", least=0)
    out: str | None = setting(None, "text", "folder of the run (default: runs/NAME)")
    EPOCHS = 3.0

    def __post_init__(self):
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, checked(each, getattr(self, each.name)))
        if self.model is None:
            object.__setattr__(self, "model", os.environ.get("FINETUNE_LAB_MODEL") or "tiny")
        if self.data is None and self.task is None:
            raise UserError("there is nothing to train on: give data (a JSONL file or hub data set) or task.")
        for one, other in (("data", "task"), ("steps", "epochs"), ("valid", "hold_out")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"{one} and {other} are both given: keep one of them.")
        if self.task and (self.valid or self.hold_out):
            raise UserError(f"the task {self.task} has its own held-out items: leave valid and hold_out away.")

    def completed(self, parameters: int, **values) -> Self:
        """A recipe with every open setting filled: by `values`, then by method and size of the model (parameters)."""
        tier = tier_of(parameters)
        usual = self.usual(tier)
        fill = values | {
            "alpha": 2.0 * self.rank,
            "lr": usual.full_lr if self.method == "full" else usual.lora_lr,
            "batch_size": usual.batch_size,
            "items": usual.items if self.task else None,
            "test_items": tier.test_items,
            "out": f"runs/{self.name()}",
        }
        if self.steps is None and self.epochs is None:
            fill |= {"steps": usual.steps} if self.task else {"epochs": self.EPOCHS}
        return dataclasses.replace(self, **{k: v for k, v in fill.items() if getattr(self, k) is None})

    def usual(self, tier: Tier) -> tiers.Recipe:
        """The settings that this tier has for this kind of training."""
        return tier.recipes.get(self.task or "", tier.recipes["extract"])

    def name(self) -> str:
        """A short name of the run: trainer, data, model, method."""
        data = self.task or Path(self.data.split(":")[0]).stem
        return f"{self.trainer()}-{data}-{Path(self.model).name}-{self.method}".lower()

    @classmethod
    def trainer(cls) -> str:
        """The command that runs this recipe."""
        return cls.__name__.removesuffix("Recipe").lower()

    def dump(self) -> str:
        """The recipe as YAML that `load` reads back to an equal recipe; settings left open are not in it."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False)


@dataclass(frozen=True, kw_only=True)
class SftRecipe(Recipe):
    """Supervised fine-tuning: what counts in the loss, packing, NEFTune."""

    loss: str | None = setting(
        None, "text", "tokens that count (default: completion, or assistant for messages)",
        choices=("completion", "assistant", "all"),
    )  # fmt: skip
    packing: bool = setting(False, "switch", "several examples in a row, kept apart by position ids (bfd)")
    neftune: float | None = setting(None, "number", "NEFTune: alpha of the noise on the embeddings", above=0, such_as=5)


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def tier_of(parameters: int) -> Tier:
    """The class of a model by its number of parameters: tiny below 20 million, small below half a billion."""
    return TINY if parameters < 20e6 else SMALL if parameters < 5e8 else LARGE


def load(kind: type[AnyRecipe], path: str | Path | None, given: dict | None = None) -> AnyRecipe:
    """A recipe from a YAML file (or None) and the settings in `given`, which win. Raises UserError, one sentence."""
    values = read_yaml(Path(path)) if path else {}
    known = [each.name for each in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"Settings: {', '.join(known)}."
            if key in ELSEWHERE:
                hint = f"Here it is called {ELSEWHERE[key]!r}."
            elif close:
                hint = f"Did you mean {close[0]!r}?"
            raise UserError(f"{path}: there is no setting {key!r}. {hint}")
    given = {k: v for k, v in (given or {}).items() if v is not None}
    if "task" in given:  # a flag replaces the file's choice, not only adds to it
        values = {k: v for k, v in values.items() if k not in ("data", "valid", "hold_out")}
    if "data" in given:
        values.pop("task", None)
    for one, other in (("steps", "epochs"), ("epochs", "steps"), ("valid", "hold_out"), ("hold_out", "valid")):
        if one in given and other not in given:
            values.pop(other, None)
    return kind(**(values | given))


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file. Raises UserError when it cannot be read, is not YAML or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}. Give a YAML file with settings.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text. Give a YAML file with settings.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path} is not YAML: {where}{getattr(error, 'problem', error)}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {'nothing' if values is None else 'no settings'}: write lines like `lr: 2e-4`.")
    return values
