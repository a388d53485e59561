"""Paged optimizer states: a simulator of which pages lie on the device while steps of unequal length go by.

Paper: QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3, "Paged Optimizers"). Rule: states live in pages that
device and host can both hold (CUDA unified memory). When something else needs room, the least recently used pages move
out; a page that is touched while it is out moves in: a page fault. Without pages the same step would be out of memory.
Leaves out: the driver's prefetching, the cost of a fault, fragmentation. In production: `bitsandbytes.optim.PagedAdamW8bit`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PAGE = 2**21  # 2 MiB, what the CUDA driver moves at most at a time


class PagedMemory:
    """A device of `capacity` bytes: ordinary memory that must stay, and pages that may move to the host.

    `faults` and `evictions` count pages that moved in and out. Raises ValueError for a page that is larger than the device.
    """

    def __init__(self, capacity: int, page: int = PAGE):
        if not 0 < page <= capacity:
            raise ValueError(
                f"a page of {page} bytes on a device of {capacity}: give a page that fits, at least 1 byte"
            )
        self.capacity, self.page = capacity, page
        self.ordinary = self.faults = self.evictions = 0
        self.resident: OrderedDict[int, None] = OrderedDict()  # least recently used page first

    @property
    def used(self) -> int:
        """Bytes of the device in use: ordinary memory and resident pages."""
        return self.ordinary + len(self.resident) * self.page

    def allocate(self, nbytes: int) -> None:
        """Take ordinary memory; pages give way. Raises MemoryError when it does not fit even without a single page."""
        if self.ordinary + nbytes > self.capacity:
            raise MemoryError(
                f"{nbytes} bytes beside {self.ordinary} do not fit into {self.capacity}: only optimizer states are "
                "paged; shorten the sequence, lower the batch, or checkpoint activations"
            )
        self.ordinary += nbytes
        self._make_room(0)

    def free(self, nbytes: int) -> None:
        """Give ordinary memory back. Pages that moved out stay out until they are touched. ValueError: more than taken."""
        if nbytes > self.ordinary:
            raise ValueError(f"{nbytes} bytes to free, but only {self.ordinary} are taken")
        self.ordinary -= nbytes

    def touch(self, pages: Sequence[int]) -> int:
        """Use these pages in turn; returns the faults. Raises MemoryError when not one page fits."""
        before = self.faults
        for page in pages:
            if page in self.resident:
                self.resident.move_to_end(page)
                continue
            self._make_room(self.page)
            self.faults += 1
            self.resident[page] = None
        return self.faults - before

    def _make_room(self, nbytes: int) -> None:
        while self.used + nbytes > self.capacity:
            if not self.resident:
                raise MemoryError(f"no room for a page of {nbytes} bytes beside {self.ordinary} of {self.capacity}")
            self.resident.popitem(last=False)
            self.evictions += 1


@dataclass(frozen=True)
class Step:
    """One training step. faults and evictions count pages; moved is in bytes, both ways; `fits` tells whether the step
    would have run with the states in ordinary memory."""

    length: int
    faults: int
    evictions: int
    moved: int
    fits: bool


def simulate(
    lengths: Sequence[int], *, capacity: int, fixed: int, state: int, bytes_per_token: int, page: int = PAGE
) -> list[Step]:
    """Training steps with these sequence lengths: activations come and go, then the optimizer walks over all its states.

    capacity: bytes of the device; fixed: weights, adapters and gradients; state: optimizer states, the paged part;
    bytes_per_token: activations of a token at their peak. The states are touched once before the first step.
    Raises MemoryError when a step does not fit even with every state moved out.
    """
    memory = PagedMemory(capacity, page)
    memory.allocate(fixed)
    pages = range(-(-state // page))
    memory.touch(pages)
    steps = []
    for length in lengths:
        faults, evictions = memory.faults, memory.evictions
        activations = length * bytes_per_token
        memory.allocate(activations)
        memory.free(activations)
        memory.touch(pages)
        faults, evictions = memory.faults - faults, memory.evictions - evictions
        fits = fixed + state + activations <= capacity
        steps.append(Step(length, faults, evictions, (faults + evictions) * page, fits))
    return steps


def spike_traffic(length: int, *, capacity: int, fixed: int, state: int, bytes_per_token: int, page: int = PAGE) -> int:
    """Bytes that one step of this length moves between host and device, both ways; arguments as in `simulate`."""
    sizes = {"capacity": capacity, "fixed": fixed, "state": state, "bytes_per_token": bytes_per_token, "page": page}
    return simulate([length], **sizes)[0].moved
