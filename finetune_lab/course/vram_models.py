"""From a name to an Architecture: tiny, a preset, a folder, a config.json, or a hub id that the local cache knows.

Asks no network and loads neither torch nor transformers, so that `finetune-lab vram` answers at once.
"""

import json
import os
from pathlib import Path

from finetune_lab.errors import UserError
from finetune_lab.methods.memory import Architecture, from_config
from finetune_lab.methods.memory.presets import PRESETS, find

TINY = Path(__file__).parents[1] / "lab" / "assets" / "tiny"


def resolve(name: str) -> Architecture:
    """The architecture behind a name. Raises UserError, one sentence; never asks the network."""
    if name == "tiny":
        path = Path(os.environ.get("FINETUNE_LAB_TINY_DIR") or TINY)
    else:
        path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return _read(path / "config.json" if path.is_dir() else path, name)
    cached = _cached(name) if name.count("/") == 1 else None
    if cached:
        return _read(Path(cached), name)
    preset = find(name)
    if preset:
        return from_config(PRESETS[preset], preset)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        raise UserError(
            f"{name} is not on this machine, and this command asks no network: fetch its configuration with "
            f"`hf download {name} config.json`, or give a preset (`finetune-lab vram --list`)."
        )
    raise UserError(
        f"There is no model {name!r}: give tiny, a preset (`finetune-lab vram --list`), a folder with a config.json, "
        "such a file, or a hub id (owner/name)."
    )


def _cached(repo: str) -> str | None:
    """The config.json of a hub model in the local cache."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        found = huggingface_hub.try_to_load_from_cache(repo, "config.json")
    except HFValidationError:
        return None
    return found if isinstance(found, str) else None


def _read(path: Path, name: str) -> Architecture:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (path.parent / "adapter_config.json").is_file():
            raise UserError(f"{name} is an adapter: give its base model, and the adapter with --method.") from None
        raise UserError(f"{name} is not a model: the folder has no config.json.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name} could not be read as JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise UserError(f"{name} holds no configuration: expected the fields of a transformers config.json.")
    try:
        return from_config(config, Path(name).parent.name if name.endswith(".json") else Path(name).name)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
