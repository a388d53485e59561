"""Four bits a weight in blocks of 64: quantise, pack, restore. QLoRA's storage of the frozen base model.

Paper: QLoRA (Dettmers et al. 2023, arXiv 2305.14314, sections 2 and 3). Formula: w ~ code[q] * absmax(block of w), where
q is the index of the level nearest to w / absmax; two q in a byte, the first in the high half.
Two forms of each step: `simple_quantize` and `simple_dequantize` say what happens; `quantize` and `dequantize` do the
same, bit for bit, in chunks that stay in the cache. Leaves out: kernels that multiply without restoring the weight.
In production: `bitsandbytes.functional.quantize_4bit`, whose packed bytes and scales these are, on the CPU, to the bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .blockwise import Scales, double_quantize, restore_scales
from .codebooks import blocks, midpoints, nearest, nf4_code

SMALLEST = 1e-38  # a block whose absmax is below is scaled by this: 1 / absmax must stay finite
CHUNK = 2**15  # values worked on at a time: all buffers of a chunk stay in the cache of one core


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
    """`simple_quantize` at speed. w: any float tensor; code: (at most 16,), NF4 unless given.

    double_quant: keep the scales in 8 bits. Raises ValueError for a tensor that is empty, not float or not finite, for a
    code of more than 16 levels, and for a block size that is not even.
    """
    code = nf4_code().to(w.device) if code is None else code
    _check(w, code, blocksize)
    packed, absmax = simple_quantize(w, code, blocksize)
    return Quantized(packed, double_quantize(absmax) if double_quant else absmax, w.shape, w.dtype, blocksize, code)


def dequantize(q: Quantized, out: Tensor | None = None) -> Tensor:
    """`simple_dequantize` at speed, in q.dtype (rounded once, from fp32).

    out: a tensor of q.shape and q.dtype to write into; reusing one saves the cost of fresh memory.
    """
    restored = simple_dequantize(q.packed, q.scales, q.code, q.shape, q.blocksize).to(q.dtype)
    return restored if out is None else out.copy_(restored)


def _check(w: Tensor, code: Tensor, blocksize: int) -> None:
    if not w.is_floating_point() or w.numel() == 0:
        raise ValueError(f"w is {w.dtype} of shape {tuple(w.shape)}: give a float tensor with at least one value")
    if code.dim() != 1 or not 2 <= len(code) <= 16:
        raise ValueError(f"code has shape {tuple(code.shape)}: 4 bits address 2 to 16 levels")
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize is {blocksize}: give an even number (64 in QLoRA), two codes share a byte")
