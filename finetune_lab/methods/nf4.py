"""Four bits a weight in blocks of 64: quantise, pack, restore. QLoRA's storage of the frozen base model.

Paper: QLoRA (Dettmers et al. 2023, arXiv 2305.14314, sections 2 and 3). Formula: w ~ code[q] * absmax(block of w), where
q is the index of the level nearest to w / absmax; two q in a byte, the first in the high half.
Two forms of each step: `simple_quantize` and `simple_dequantize` say what happens; `quantize` and `dequantize` do the
same, bit for bit, in chunks that stay in the cache. Leaves out: kernels that multiply without restoring the weight.
In production: `bitsandbytes.functional.quantize_4bit`, whose packed bytes and scales these are, on the CPU, to the bit.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from finetune_lab.methods.blockwise import Scales, double_quantize, restore_scales
from finetune_lab.methods.codebooks import blocks, midpoints, nearest, nf4_code

SMALLEST = 1e-38  # a block whose absmax is below is scaled by this: 1 / absmax must stay finite
CHUNK = 2**18  # values worked on at a time: their buffers stay in the cache, and Python is called seldom


@dataclass(frozen=True)
class Quantized:
    """A tensor in 4 bits. packed: (ceil(n / 2),) uint8; absmax: (ceil(n / blocksize),) fp32, or `Scales` in 8 bits."""

    packed: Tensor
    absmax: Tensor | Scales
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    code: Tensor

    @property
    def scales(self) -> Tensor:
        """The block scales (ceil(n / blocksize),) fp32, restored where they were quantised."""
        return restore_scales(self.absmax) if isinstance(self.absmax, Scales) else self.absmax

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the weight: packed codes and scales. The code book is one for all weights."""
        return self.packed.nbytes + self.absmax.nbytes


def bits_per_parameter(q: Quantized) -> float:
    """Bits for one weight, counted from the bytes that are stored: 4.5 at block 64, 4.127 with double quantization."""
    return 8 * q.nbytes / q.shape.numel()


def pack(codes: Tensor) -> Tensor:
    """Two codes of 4 bits in a byte, the first in the high half: (n,) uint8, n even -> (n / 2,) uint8."""
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """The codes of `pack`: (n,) uint8 -> (2 n,) uint8."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


def simple_quantize(w: Tensor, code: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Packed codes (ceil(n / 2),) uint8 and block scales (ceil(n / blocksize),) fp32 of a float tensor `w`.

    Multiplies by the reciprocal of absmax, as bitsandbytes does: a division would round some values on the edge of two
    levels to the other side.
    """
    x = blocks(w, blocksize)
    absmax = x.abs().amax(1)
    scaled = x * (1 / absmax.clamp(min=1e-38))[:, None]
    if w.numel() % blocksize:  # bitsandbytes 0.50.2 divides in the last block where it is not full, on the CPU only
        absmax[-1].clamp_(min=1e-38)
        scaled[-1] = x[-1] / absmax[-1]
    even = w.numel() + w.numel() % 2
    return pack(nearest(scaled.flatten()[:even], code)), absmax


def simple_dequantize(packed: Tensor, absmax: Tensor, code: Tensor, shape: torch.Size, blocksize: int = 64) -> Tensor:
    """The weight that packed codes and scales stand for: code[q] * absmax, fp32, in the given shape."""
    values = code[unpack(packed).long()][: shape.numel()]
    return (blocks(values, blocksize) * absmax[:, None]).flatten()[: shape.numel()].view(shape)


def quantize(w: Tensor, code: Tensor | None = None, blocksize: int = 64, double_quant: bool = False) -> Quantized:
    """`simple_quantize` at speed. w: any float tensor; code: 2 to 16 levels in [-1, 1], NF4 unless given.

    double_quant: keep the scales in 8 bits. Raises ValueError for a tensor that is empty, not float or not finite, for a
    code that 4 bits cannot address, and for a block size that is odd.
    """
    code = nf4_code().to(w.device) if code is None else code
    _check(w, code, blocksize)
    flat, n = w.detach().reshape(-1), w.numel()
    full = n - n % blocksize
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // blocksize), device=w.device)
    step = max(CHUNK // blocksize, 1) * blocksize
    x_buffer = torch.empty(min(step, full), device=w.device)
    for start in range(0, full, step):
        values = flat[start : min(start + step, full)].view(-1, blocksize).float()
        x, scale = x_buffer[: values.numel()], absmax[start // blocksize :][: len(values)]
        torch.amax(torch.abs(values, out=x.view_as(values)), 1, out=scale)
        if not scale.isfinite().all():
            raise ValueError(f"w holds inf or nan between its values {start} and {start + step}: no scale fits them")
        torch.mul(values, (1 / scale.clamp(min=SMALLEST))[:, None], out=x.view_as(values))
        codes = _nearest_by_cell(x, code)
        torch.add(codes[1::2], codes[::2], alpha=16, out=packed[start // 2 :][: len(codes) // 2])
    if full < n:
        packed[full // 2 :], absmax[-1:] = simple_quantize(flat[full:], code, blocksize)
    if not absmax[-1].isfinite():
        raise ValueError("w holds inf or nan in its last block: no scale fits them")
    return Quantized(packed, double_quantize(absmax) if double_quant else absmax, w.shape, w.dtype, blocksize, code)


def dequantize(q: Quantized, out: Tensor | None = None) -> Tensor:
    """`simple_dequantize` at speed, in q.dtype (rounded once, from fp32): one look-up a byte gives two levels.

    out: a contiguous tensor of q.shape and q.dtype to write into. Reusing one is several times faster for large weights,
    because fresh memory costs more than the arithmetic. Raises ValueError where it does not fit.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.packed.device)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}: give a contiguous {q.dtype} of {tuple(q.shape)}")
    flat, n, scales = out.view(-1), out.numel(), q.scales
    pairs = _pairs(tuple(q.code.tolist())).to(out.device)
    step = max(2 * CHUNK // q.blocksize, 1) * q.blocksize
    # a pair of levels can be written into `out` itself where that is fp32 and starts at an even place
    in_place = out.dtype == torch.float32 and n % 2 == 0 and out.storage_offset() % 2 == 0
    buffer = None if in_place else torch.empty(min(step, n + n % 2), device=out.device)
    for start in range(0, n, step):
        target = flat[start : start + step]
        index = q.packed[start // 2 :][: (len(target) + 1) // 2].int()
        levels = target if in_place else buffer[: 2 * len(index)]
        torch.index_select(pairs, 0, index, out=levels.view(torch.float64))
        scale = scales[start // q.blocksize :][: -(-len(target) // q.blocksize)]
        full = len(target) // q.blocksize
        levels[: full * q.blocksize].view(-1, q.blocksize).mul_(scale[:full, None])
        levels[full * q.blocksize : len(target)].mul_(scale[-1])
        if not in_place:
            target.copy_(levels[: len(target)])
    return out


def _nearest_by_cell(x: Tensor, code: Tensor) -> Tensor:
    """`nearest(x, code)` for x (n,) fp32 in [-1, 1], changed in place, without a search: cells of equal width, narrow
    enough that at most one boundary lies in each. The cell gives all levels but the last step, one comparison that."""
    half, below, boundary, order = _cells(tuple(code.tolist()))
    cell = x.mul_(half).int().add_(half)  # a power of two: exact
    codes = below.to(x.device).index_select(0, cell)
    codes += x > boundary.to(x.device).index_select(0, cell)
    return codes if order is None else order.to(x.device).index_select(0, codes.int())


@cache
def _cells(levels: tuple[float, ...]) -> tuple[int, Tensor, Tensor, Tensor | None]:
    """Cells for the values half * x: their number on each side of 0, and for each of them the boundaries below it
    (uint8) and the boundary in it (inf where there is none); the order of the levels, None where it is ascending."""
    boundaries, order = midpoints(torch.tensor(levels))
    half = 8
    while len((cell := (boundaries * half).int() + half).unique()) < len(boundaries):
        half *= 2
        if half > 2**20:
            raise ValueError(f"code {levels} has levels too close to tell apart: give distinct ones")
    below = torch.searchsorted(cell, torch.arange(2 * half + 1, dtype=torch.int32)).to(torch.uint8)
    boundary = torch.full((2 * half + 1,), torch.inf)
    boundary[cell.long()] = boundaries * half
    ascending = bool((order.diff() > 0).all())
    return half, below, boundary, None if ascending else order.to(torch.uint8)


@cache
def _pairs(levels: tuple[float, ...]) -> Tensor:
    """The two fp32 levels that each byte stands for, side by side in the bits of one float64: (256,)."""
    both = torch.zeros(16)
    both[: len(levels)] = torch.tensor(levels)
    byte = torch.arange(256)
    return torch.stack([both[byte >> 4], both[byte & 15]], dim=1).view(torch.float64).flatten()


def _check(w: Tensor, code: Tensor, blocksize: int) -> None:
    if not w.is_floating_point() or w.numel() == 0:
        raise ValueError(f"w is {w.dtype} of shape {tuple(w.shape)}: give a float tensor with at least one value")
    if code.dim() != 1 or not 2 <= len(code) <= 16 or code.abs().max() > 1:
        raise ValueError(f"code has shape {tuple(code.shape)}: give 2 to 16 levels in [-1, 1], 4 bits address no more")
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize is {blocksize}: give an even number (64 in QLoRA), two codes share a byte")
