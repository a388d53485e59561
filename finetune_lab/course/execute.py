"""Run a notebook in a fresh kernel, in memory: what `build --execute` and `finetune-lab run` share.

nbclient does the work. This module adds the settings that make a run quiet and repeatable, and what is kept of the
outputs. A cell timeout is always set: matplotlib with widgets has hung a kernel before.
"""

import atexit
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from finetune_lab.errors import UserError

MAX_BYTES = 300_000
QUIET = {
    "FINETUNE_LAB_LIVE": "0",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
WIDGET = "application/vnd.jupyter.widget-view+json"
_PATH = re.compile(
    r"(?<![\w.:/~])/(?:home|Users|root|tmp|var|work|opt|usr|mnt|private)/[\w.\-/]+|[A-Z]:\\\\?Users\\\\?\w+"
)


def run(
    notebook: nbformat.NotebookNode,
    folder: Path,
    settings: dict[str, str],
    timeout: float,
    on_cell: Callable[[], None] = lambda: None,
    stop_at_error: bool = False,
) -> tuple[float, str | None]:
    """Execute `notebook` in place, with `folder` as working directory and `settings` as additional environment.

    Returns:
        seconds, and why the run broke off (a dead kernel, a cell over `timeout` seconds; None: it did not).
        Errors that cells raised are in the notebook's outputs: `failures` lists them.

    Raises:
        UserError: the kernel did not start.
    """
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        allow_errors=not stop_at_error,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        on_cell_executed=lambda **_: on_cell(),
        resources={"metadata": {"path": str(folder)}},
    )
    start = time.perf_counter()
    broke = None
    try:
        # The kernel's own log is noise (cells' stderr comes as output).
        client.execute(env={**os.environ, **QUIET, **settings}, stderr=subprocess.DEVNULL)
    except CellExecutionError:
        pass  # its output is in the notebook
    except CellTimeoutError:
        broke = f"a cell ran longer than {timeout:.0f} s"
    except DeadKernelError:
        broke = "the kernel died (out of memory?)"
    except Exception as error:
        if "Kernel didn't respond" in str(error):
            atexit.unregister(client._cleanup_kernel)  # nbclient 0.11 did it, and would trip over that at exit
            raise UserError(
                f"the notebook's kernel did not answer in {client.startup_timeout} seconds: this machine is very busy, or a "
                "firewall closes its own address 127.0.0.1. Mend that and run it again."
            ) from None
        if not _interrupted(client):
            raise
    if _interrupted(client):
        raise KeyboardInterrupt
    return time.perf_counter() - start, broke


def _interrupted(client: NotebookClient) -> bool:
    """Did Ctrl-C end this run? nbclient 0.11 answers it by ending the kernel, and then trips over the kernel's absence
    in one way or another; the future of that clean-up is the trace it leaves. asyncio would print the rest at exit.
    """
    stopped = getattr(client, "_async_cleanup_kernel_future", None) is not None
    if stopped:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    return stopped


def failures(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """(cell id, `ValueError: first line of the message`) of every cell that holds an error."""
    found = []
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                message = (output.evalue.strip().splitlines() or [""])[0]
                found.append((cell.get("id", str(index)), f"{output.ename}: {message}".rstrip(": ")))
    return found


def tidy(notebook: nbformat.NotebookNode) -> list[str]:
    """Strip from the outputs, in place, what must not be kept; return what was said on stderr, by cell.

    A picture or table replaces its widget: without a kernel JupyterLab shows an error in the widget's place.
    """
    said = []
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            output.pop("transient", None)
            data = output.get("data", {})
            if "image/png" in data or "text/html" in data:
                data.pop(WIDGET, None)
            if output.output_type == "stream" and output.name == "stderr":
                said.append(f"{cell.id}: {(output.text.strip().splitlines() or [''])[-1]}")
        cell.outputs = [out for out in cell.outputs if not (out.output_type == "stream" and out.name == "stderr")]
    return said


def publishable(notebook: nbformat.NotebookNode) -> list[str]:
    """Why these outputs may not be published (empty: they may): paths of a machine, or too many bytes."""
    problems = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts = [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
            found = _PATH.search("\n".join([output.get("text", ""), *texts]))
            if found:
                problems.append(f"cell {cell.id} shows a path of this machine: {found.group()}")
    size = len(nbformat.writes(notebook, version=4).encode())
    if size > MAX_BYTES:
        problems.append(f"{size / 1000:.0f} kB with outputs, the limit is {MAX_BYTES / 1000:.0f} kB")
    return problems
