"""Write a model folder that is either whole or not there: shards, index, and what belongs beside them.

Everything goes into a hidden folder beside the result, is flushed to the disk, and gets its name by one rename at the
very end. A process that is killed leaves only the hidden folder and its lock, which the next merge of that name
deletes. A shard's header is written before its tensors, as their shapes are known; so no shard is ever held in memory.
In production: `safetensors.torch.save_file`, which takes a whole shard at once.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from finetune_lab.errors import UserError
from finetune_lab.lab.merging.checkpoint import NAMES
from finetune_lab.lab.merging.layout import Planned

CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
           "chat_template.json")  # fmt: skip
INDEX = "model.safetensors.index.json"


def shards(tensors: Sequence[Planned], most: int) -> dict[str, list[Planned]]:
    """Files and the tensors in each, at most `most` bytes a file (a larger tensor has one of its own).

    In a file wide dtypes come first, so that each tensor starts at a multiple of its item size.
    """
    groups: list[list[Planned]] = [[]]
    for planned in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + planned.nbytes > most:
            groups.append([])
        groups[-1].append(planned)
    groups = [sorted(group, key=lambda t: -t.dtype.itemsize) for group in groups]
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def header(tensors: Sequence[Planned]) -> bytes:
    """The start of a safetensors file: length, then JSON padded to a multiple of 8 bytes."""
    entries: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for planned in tensors:
        entries[planned.name] = {
            "dtype": NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": [at, at + planned.nbytes]
        }  # fmt: skip
        at += planned.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, tensors: Sequence[Planned], values: Iterable[Tensor]) -> None:
    """Write one safetensors file from values that come in order, whole or in pieces, and flush it to the disk."""
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(header(tensors)))
        for value in values:
            _write_all(file, memoryview(value.contiguous().view(-1).view(torch.uint8).numpy()))
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, files: dict[str, list[Planned]]) -> None:
    """The index of a sharded model; nothing for a single file."""
    if len(files) > 1:
        total = sum(planned.nbytes for group in files.values() for planned in group)
        names = {planned.name: file for file, group in files.items() for planned in group}
        write_text(
            folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=1) + "\n"
        )


def carry(source: Path, folder: Path, patterns: Sequence[str]) -> list[str]:
    """Copy the files of `source` that fit a pattern; returns their names."""
    files = sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()})
    for path in files:
        shutil.copyfile(path, folder / path.name)
        with (folder / path.name).open("rb") as file, contextlib.suppress(OSError):
            os.fsync(file.fileno())
    return [path.name for path in files]


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """An empty hidden folder to fill; it becomes `out` when the block ends well, and goes when it fails.

    Raises UserError when `out` exists (nothing is ever overwritten), when another process is writing it, or when the
    disk is full.
    """
    check_free(out)
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out.with_name(f".{out.name}.lock")):
            shutil.rmtree(part, ignore_errors=True)  # of a merge that was killed
            part.mkdir()
            try:
                yield part
                check_free(out)
                _flush_folder(part)
                part.rename(out)
                _flush_folder(out.parent)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except Timeout:
        raise UserError(f"another process is merging into {out}: wait for it, or give another --out.") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full: make room" if full else f"{error.strerror or error}"
        raise UserError(f"{out} could not be written ({why}), and nothing was left; give another --out.") from error


def check_free(out: Path) -> None:
    """Raise UserError when something stands where the result should go."""
    if out.exists():
        raise UserError(f"{out} exists, and a merge never overwrites: give another --out, or delete it.")


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock within the block, and remove its file after it. Raises filelock.Timeout when another one holds it.

    Only the holder removes the file. Who opened it before that, and gets its lock after, guards a file without a name,
    while the next process makes a new one: so a lock counts only if the file seen before still has its name.
    """
    held = FileLock(lock)
    while True:
        with lock.open("ab") as seen:
            held.acquire(timeout=0)
            if os.fstat(seen.fileno()).st_nlink:
                break
        held.release()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; filelock does it there, at the release
            lock.unlink()
        held.release()


def _write_all(file, data: memoryview) -> None:
    """Write every byte, 1 MiB at a time: the kernel was up to three times slower with 100 MB at once (Linux 6.18)."""
    while data:
        data = data[file.write(data[: 2**20]) :]


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can (Windows cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
