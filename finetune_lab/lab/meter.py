"""Measure what a piece of code costs: the peak of the extra memory it takes, and its time next to another's.

Memory is read from the allocator through torch.profiler (CPU), not from the process size: exact and repeatable.
Times are compared in interleaved rounds: the machine's noise then hits both, and the ratio is what you can trust.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile, record_function


def peak_bytes(fn: Callable[[], object]) -> int:
    """Largest number of bytes that `fn()` holds at one time beyond what existed before the call (CPU tensors).

    Counts every allocation of torch's CPU allocator, temporary buffers inside kernels included.
    """
    return max(0, *held_over_time({"call": fn})["call"])


def held_over_time(phases: dict[str, Callable[[], object]]) -> dict[str, list[int]]:
    """Bytes held beyond those before the first phase, after each allocation and release, phase by phase (CPU tensors).

    Runs all phases once to warm up, then once in one recording, in order: {"forward": ..., "backward": ...}.
    """
    for fn in phases.values():
        fn()  # a first call may build caches
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        for name, fn in phases.items():
            with record_function(f"phase {name}"):
                fn()
    events = run.profiler.kineto_results.events()
    ends = {e.name(): e.start_ns() + e.duration_ns() for e in events if e.name().startswith("phase ")}
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    curves: dict[str, list[int]] = {name: [] for name in phases}
    held = 0
    for event in memory:
        held += event.nbytes()
        phase = next((name for name in phases if event.start_ns() <= ends[f"phase {name}"]), None)
        if phase is not None:
            curves[phase].append(held)
    return curves


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: the profiler of torch 2.13 writes 'USDT:' lines there, whatever its log level."""
    keep = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep)
        os.close(nowhere)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside, as before afterwards; also a decorator: `@one_thread()`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved_seconds(fns: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of CPU time of every function in every round; round i runs each of them once, in turn.

    CPU time of this process, not wall time: another program on the machine changes it little.
    """
    for fn in fns.values():
        fn()
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            start = time.process_time()
            fn()
            seconds[name].append(time.process_time() - start)
    return seconds


def median_ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of time(slow) / time(fast): how many times faster `fast` is."""
    return median(s / f for s, f in zip(seconds[slow], seconds[fast], strict=True))
