"""A progress bar for work that somebody else does: it watches how many bytes a folder holds.

pip and huggingface_hub draw bars of their own, in two styles, and neither in a notebook when run as a child process.
"""

import contextlib
import sys
import threading
from pathlib import Path

from tqdm.auto import tqdm


def folder_bytes(folder: Path) -> int:
    """Bytes in all files under `folder`; files that vanish while we count are skipped."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


@contextlib.contextmanager
def watch_folder(folder: Path, total: int, label: str, *, show: bool = True, every: float = 0.2):
    """Draw a bar from 0 to `total` bytes while the body runs, fed by the growth of `folder`."""
    if not show:
        yield
        return
    start, stop = folder_bytes(folder), threading.Event()
    bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr)

    def follow():
        while not stop.wait(every):
            bar.n = min(total, max(bar.n, folder_bytes(folder) - start))
            bar.refresh()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
        bar.n = total
    finally:
        stop.set()
        thread.join()
        bar.close()
