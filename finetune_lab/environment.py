"""Process-wide settings, in one place: threads, noise, telemetry.

`prepare()` runs once, when the package is imported, so notebooks, tests and the command line behave alike.
It imports nothing heavy and never overrides what the reader has set.
"""

import logging
import os

# Why each one is here:
DEFAULTS = {
    # A fork after the tokenizer was used prints a warning and may hang.
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # A learner sees one progress bar, ours.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

# bitsandbytes 0.50.2 warns at import on CPUs with AVX512-BF16 that an optional 4-bit kernel was not loaded.
# The plain kernel then does the work. `finetune-lab doctor` explains it; nobody needs to see it in each cell.
NOISY_LOGGERS = ("bitsandbytes.backends.cpu.ops",)

# Set beside OMP_NUM_THREADS when the value is ours and not the reader's, so that child processes know as well.
OURS = "FINETUNE_LAB_OMP_IS_DEFAULT"


def prepare() -> None:
    """Set the defaults above, and one thread: the tiny model is slower on two (one step 83 ms on one thread,
    1,179 ms on two threads of a busy two-core machine)."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ[OURS] = "1"
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def threads_for(model: str) -> int:
    """How many threads torch should use for a model: one for `tiny`, every core for a real one.

    A number that the reader put into OMP_NUM_THREADS wins.
    Use: `torch.set_num_threads(threads_for(name))`.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if OURS not in os.environ and given.isdigit() and int(given) > 0:
        return int(given)
    return 1 if model == "tiny" else (os.cpu_count() or 1)
