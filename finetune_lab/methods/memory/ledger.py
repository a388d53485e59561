"""The ledger: every line of bytes with its reason, and who is alive at each moment of one training step.

A moment's bytes are the sum of its categories; the peak is the largest moment. Lines that belong to the device and not
to the tensors (CUDA context, allocator rounding, fragmentation) are kept apart: they are stated, not proved on a CPU.
"""

from dataclasses import dataclass

CATEGORIES = (
    "weights",
    "quantisation state",
    "adapters",
    "gradients",
    "master weights",
    "optimizer",
    "activations",
    "logits",
    "temporaries",
    "KV cache",
    "reference model",
    "other models",
)
DEVICE = ("context", "fragmentation")


@dataclass(frozen=True)
class Line:
    """One entry: `bytes` of `category`, and `why`, the formula with its numbers put in."""

    category: str
    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Ledger:
    """Result of `estimate`. All figures in bytes, on one device (one rank)."""

    lines: tuple[Line, ...]  # what exists, once each; temporaries only in `timeline`
    moments: tuple[tuple[str, dict[str, int]], ...]  # (moment, {category: bytes alive}) in the order of a step
    device: tuple[Line, ...] = ()  # context and fragmentation
    host: tuple[Line, ...] = ()  # offloaded or paged to the host's memory: in no moment and not in the peak

    def timeline(self) -> list[tuple[str, dict[str, int]]]:
        """(moment, {category: bytes}) through one step, for the picture of memory over time."""
        return [(moment, dict(alive)) for moment, alive in self.moments]

    @property
    def totals(self) -> dict[str, int]:
        """Moment -> bytes alive."""
        return {moment: sum(alive.values()) for moment, alive in self.moments}

    @property
    def peak(self) -> int:
        return max(self.totals.values())

    @property
    def peak_moment(self) -> str:
        totals = self.totals
        return max(totals, key=totals.get)

    def categories(self) -> dict[str, int]:
        """{category: bytes} at the peak, largest part of a run first in the order of CATEGORIES; sums to `peak`."""
        alive = dict(self.moments)[self.peak_moment]
        return {name: alive[name] for name in CATEGORIES if alive.get(name)}

    def total(self, category: str) -> int:
        """Bytes of a category over all lines, at its own fullest."""
        return sum(line.bytes for line in self.lines if line.category == category)

    @property
    def total_on_device(self) -> int:
        """Peak, CUDA context and fragmentation together: what `nvidia-smi` would show."""
        return self.peak + sum(line.bytes for line in self.device)
