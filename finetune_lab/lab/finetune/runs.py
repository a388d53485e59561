"""The folder of a run: one process at a time, what it is, how far it got, and checkpoints that count only when complete.

    runs/NAME/recipe.yaml       the completed recipe: `finetune-lab sft runs/NAME/recipe.yaml` is the same run
    runs/NAME/run.json          what the run is (recipe, data, processes) and whether it is finished
    runs/NAME/checkpoints/      while it trains; transformers writes here, file by file
    runs/NAME/adapter|model/    the result, safetensors only
    runs/NAME/report.md|json    and curve.png

A process can be killed at any moment, so a checkpoint counts only when `complete.json` stands in it. That file is
written last, by rename, and lists every file with its size; a folder that does not match it is deleted at the next start.

About pickles. transformers 5.23 saves optimizer, schedule and random state with `torch.save`, and loads them with
`weights_only=True`, which builds tensors and numbers and runs no code of the file. Only `training_args.bin` is a real
pickle; nothing reads it, and it is removed before a checkpoint counts. The finished run keeps no checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from finetune_lab.errors import UserError

MARK = "complete.json"


def write(path: Path, value) -> None:
    """Write text (or a value as JSON) so that the file is either the old one or the whole new one."""
    text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read(path: Path) -> dict | None:
    """The JSON object in a file; None when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it when the process ends, however it ends.

    The lock lies beside the folder, not in it, so that `put_aside` can rename the folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout:
        raise UserError(f"another process is training in {folder}: wait for it, or give another --out.") from None
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{folder} cannot be used as the run's folder: {error.strerror}. Give another --out.") from None


def state_of(folder: Path, identity: dict) -> str:
    """What stands in the folder for this run: 'new', 'unfinished' (the same run, go on) or 'finished'.

    identity: everything that must be equal for the result to be the same, as {"name": value}.
    Raises UserError when the folder holds another run, naming what differs, or files that are no run.
    """
    known = read(folder / "run.json")
    if known is None:
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
        if others:
            raise UserError(f"{folder} holds files but no run ({', '.join(sorted(others)[:3])}): give another --out.")
        return "new"
    before = known.get("identity", {})
    changed = [k for k in identity if before.get(k) != identity[k]]
    if changed:
        listed = ", ".join(f"{k} was {before.get(k)!r} and is now {identity[k]!r}" for k in changed[:4])
        raise UserError(
            f"{folder} holds another run: {listed}. Give another --out, or --fresh to put that run aside and start anew."
        )
    return "finished" if known.get("finished") else "unfinished"


def put_aside(folder: Path) -> Path | None:
    """Rename a run's folder to NAME.1, NAME.2, ... and return the new place; None when there was nothing."""
    if not (folder / "run.json").exists():
        return None
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def mark_complete(checkpoint: Path, **facts) -> None:
    """Drop the pickle that nobody reads, flush every file to the disk, and write the mark with names and sizes."""
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    sizes = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARK):
        with path.open("rb") as file:
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
            sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    write(checkpoint / MARK, {"files": sizes, "written": time.time(), **facts})


def is_complete(checkpoint: Path) -> bool:
    """True when the mark is there and every file that it lists has its size."""
    mark = read(checkpoint / MARK)
    if not mark or not isinstance(mark.get("files"), dict):
        return False
    return all((p := checkpoint / name).is_file() and p.stat().st_size == n for name, n in mark["files"].items())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; those that were cut off in the middle are deleted."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir():
            if is_complete(path):
                found.append(path)
            else:
                shutil.rmtree(path)
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def find_adapter(path: str) -> Path:
    """The adapter's folder: the path itself, or `adapter` in the folder of a run. Raises UserError."""
    folder = Path(path).expanduser()
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file():
            if not (place / "adapter_model.safetensors").is_file():
                raise UserError(
                    f"{place} has no adapter_model.safetensors; other formats are pickles and are not read."
                )
            return place
    if (folder / "model" / "config.json").is_file():
        raise UserError(f"{path} holds a fully fine-tuned model, not an adapter: use --model {folder / 'model'}.")
    raise UserError(f"{path} holds no adapter (no adapter_config.json): give the folder of a run or of an adapter.")


def base_of(adapter: Path) -> str:
    """The name of the model that an adapter was trained on."""
    try:
        return str(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{adapter / 'adapter_config.json'} cannot be read: {error}") from error


def start_of(path: str) -> str | None:
    """What a run of preference training began with: the `adapter` in its recipe; None when it began with a model."""
    place = find_adapter(path)
    try:
        recipe = yaml.safe_load((place.parent / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    start = recipe.get("adapter") if isinstance(recipe, dict) else None
    return start if isinstance(start, str) else None


def fingerprint(adapter: Path) -> str:
    """A hash of an adapter's weights: a run that goes on must have begun at the same ones."""
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def settings_of(adapter: Path) -> dict:
    """{"method", "rank", "alpha", "targets"} of an adapter, in the words of a recipe."""
    config = read(adapter / "adapter_config.json") or {}
    try:
        targets = config["target_modules"]
        method = "dora" if config.get("use_dora") else "lora"
        with contextlib.suppress(OSError):
            if re.search(
                r"^method: qlora$", (adapter.parent / "recipe.yaml").read_text(encoding="utf-8"), re.MULTILINE
            ):
                method = "qlora"  # the adapter's file does not say that its base was in 4 bits
        return {
            "method": method, "rank": int(config["r"]), "alpha": float(config["lora_alpha"]),
            "targets": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        }  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"{adapter / 'adapter_config.json'} describes no LoRA adapter ({error} is missing).") from error
