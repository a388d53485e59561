"""Models from the hub: short waits, plain sentences, and what is on disk first.

`snapshot` looks into the local cache of huggingface_hub before it asks anybody, so that a lesson runs the same
tomorrow and on a train. HF_HUB_OFFLINE=1 forbids asking. A dead network costs seconds, not minutes.
Only configuration, tokenizer and safetensors are downloaded. huggingface_hub resumes a broken download by itself.
"""

import fnmatch
import json
import os
import re
import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from finetune_lab.errors import UserError
from finetune_lab.lab.bars import watch_folder

WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
UNWANTED = ("*/*", "consolidated*")  # other frameworks' copies of the same weights
PATIENCE = 8.0  # seconds to wait for the hub's first answer


class HubSilent(UserError):
    """The hub may not be asked, or does not answer."""


def looks_like_id(name: str) -> bool:
    """True for `owner/name`, the only form of a hub id that the course takes."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/", "~"))


def is_offline() -> bool:
    """True when HF_HUB_OFFLINE forbids the hub, also if it was set after huggingface_hub was imported."""
    return (
        os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"} or huggingface_hub.is_offline_mode()
    )


def cached(repo: str, revision: str | None = None) -> Path | None:
    """The folder of a complete copy in the local cache, or None. Asks nobody."""
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, HFValidationError):
        return None
    # A broken download leaves a folder too: believe it only with weights and configuration inside.
    index = folder / "model.safetensors.index.json"
    try:
        needed = {"config.json", *(shards(index) if index.is_file() else {"model.safetensors"})}
    except (ValueError, KeyError):
        return None
    return folder if all((folder / name).is_file() for name in needed) else None


def shards(index: Path) -> set[str]:
    """The files that a model.safetensors.index.json names. Raises ValueError or KeyError for another kind of file."""
    return set(json.loads(index.read_text())["weight_map"].values())


def snapshot(repo: str, revision: str | None = None, *, progress: bool = True) -> Path:
    """The local folder of a hub model, downloaded if it is not there yet. `revision`: a commit; None is `main`.

    Raises HubSilent when the hub may not be asked or does not answer, UserError when it says no.
    """
    folder = cached(repo, revision)
    if folder is not None:
        return folder
    files = _ask(repo, revision)
    wanted = {f: size for f, size in files.items() if _matches(f, WANTED) and not _matches(f, UNWANTED)}
    if not any(f.endswith(".safetensors") for f in wanted):
        raise UserError(
            f"{repo} has no safetensors on the hub ({'only pickles' if _has_pickles(files) else 'no weights at all'}). "
            "Reading a pickle can run any code: choose a model that is saved as safetensors."
        )
    store = Path(huggingface_hub.constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--")) / "blobs"
    try:
        with watch_folder(store, sum(wanted.values()), f"{repo}", show=progress):
            return Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
                )
            )
    except GatedRepoError as error:
        raise UserError(f"{repo} is gated: accept its licence on the hub, then run `hf auth login`.") from error
    except Exception as error:  # the hub's client raises a dozen kinds for a network that goes away
        raise HubSilent(f"The download of {repo} stopped ({_first_line(error)}). Run it again: it resumes.") from error


def _ask(repo: str, revision: str | None) -> dict[str, int]:
    """File names and sizes in bytes of a hub repository; waits PATIENCE seconds at most."""
    if is_offline():
        raise HubSilent(
            f"{repo} is not on this machine, neither a folder nor in the cache, and HF_HUB_OFFLINE=1 forbids asking "
            "the hub: unset it."
        )
    answer: dict = {}

    def ask():
        try:
            info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=PATIENCE, files_metadata=True)
            answer["files"] = {f.rfilename: f.size or 0 for f in info.siblings}
        except Exception as error:  # noqa: BLE001  (handed to the thread that waits)
            answer["error"] = error

    # In a thread, because looking up a name has no timeout of its own in Python.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(1.25 * PATIENCE)
    error = answer.get("error")
    if "files" in answer:
        return answer["files"]
    if isinstance(error, GatedRepoError):
        raise UserError(f"{repo} is gated: accept its licence on the hub, then run `hf auth login`.") from error
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)):
        raise UserError(
            f"Neither a folder nor the hub has a model {repo!r} (or it is private, and you are not logged in)."
        ) from error
    why = _first_line(error) if error else f"no answer in {1.25 * PATIENCE:.0f} s"
    raise HubSilent(f"{repo} is not on this machine and the hub does not answer ({why}): check your connection.")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _has_pickles(files) -> bool:
    return any(f.endswith((".bin", ".pt", ".pth")) for f in files)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
