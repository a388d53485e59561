"""The k-th largest magnitude of a tensor of any size, exactly, in two passes over its chunks and without sorting.

How: the bits of a non-negative fp32 number, read as an integer, are in the order of the numbers. Pass 1 counts the
upper 15 bits (sign dropped) of every entry; the counts, summed from the top, tell which of the 2^15 bins the k-th
largest is in. Pass 2 counts the lower 16 bits of the entries of that bin: then every bit of the threshold is known.
This is radix selection: a radix sort that looks only where the answer is. torch's topk on CUDA works like this too.
Cost: two reads and n counts, where sorting costs n log n; memory: one chunk. Finds fp32 values only.
In production: `torch.topk`, `torch.kthvalue`; mergekit 0.1.5 sorts all entries.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LOW_BITS = 16


class Cut:
    """Keeps the k entries of largest magnitude of a tensor that comes in chunks, and zeroes the others.

    chunks: a function that starts a new pass over the tensor: fp32 chunks, the same ones at every call; k: at least 1.
    Afterwards call the cut with each chunk, in the same order: of magnitudes equal to `threshold` those that come
    first in memory stay, as many as are needed.
    """

    def __init__(self, chunks: Callable[[], Iterable[Tensor]], k: int) -> None:
        self.threshold, self.wanted, self.equal = kth_largest_magnitude(chunks, k)

    def __call__(self, x: Tensor, scratch: Tensor) -> Tensor:
        """Zero the small entries of the chunk `x` in place; scratch: a buffer of its size and dtype."""
        magnitude = torch.abs(x, out=scratch)
        if self.wanted == 0:  # every place at the threshold is taken
            return x.mul_(torch.gt(magnitude, self.threshold, out=magnitude))
        if self.wanted < self.equal:  # more entries at the threshold than places for them
            at_threshold = (magnitude == self.threshold).nonzero().squeeze(1)
            x[at_threshold[self.wanted :]] = 0
            self.wanted = max(0, self.wanted - len(at_threshold))
            self.equal -= len(at_threshold)
        return x.mul_(torch.ge(magnitude, self.threshold, out=magnitude))


def kth_largest_magnitude(chunks: Callable[[], Iterable[Tensor]], k: int) -> tuple[float, int, int]:
    """(threshold, wanted, equal): the k-th largest |entry|, how many entries equal to it belong to the k, and how many
    there are in all. So `wanted` plus the number of larger entries is k. chunks as in `Cut`; NaN counts as largest.
    """
    counts = torch.zeros(2 ** (31 - LOW_BITS), dtype=torch.int64)
    for x in chunks():
        high = _bits(x).bitwise_right_shift_(LOW_BITS)
        counts += torch.bincount(high, minlength=len(counts))
    high_bits, k = _bin_of_kth(counts, k)
    counts = torch.zeros(2**LOW_BITS, dtype=torch.int64)
    for x in chunks():
        bits = _bits(x)
        inside = bits[bits >> LOW_BITS == high_bits] & (2**LOW_BITS - 1)
        counts += torch.bincount(inside, minlength=len(counts))
    low_bits, wanted = _bin_of_kth(counts, k)
    threshold = torch.tensor(high_bits << LOW_BITS | low_bits, dtype=torch.int32).view(torch.float32)
    return threshold.item(), wanted, int(counts[low_bits])


def _bits(x: Tensor) -> Tensor:
    """The bits of |x| as int32, a new tensor: larger magnitudes are larger integers."""
    return x.view(torch.int32) & 0x7FFFFFFF


def _bin_of_kth(counts: Tensor, k: int) -> tuple[int, int]:
    """Which bin, counted from the top one, holds the k-th entry, and the how-many-th it is inside that bin."""
    at_least = counts.flip(0).cumsum(0)  # entries in this bin or above it
    place = int(torch.searchsorted(at_least, k))
    bin = len(counts) - 1 - place
    return bin, k - int(at_least[place] - counts[bin])
