"""Eight bits a value in blocks of 256: for optimizer states, and for the block scales of a 4-bit weight.

Papers: block-wise 8-bit states, Dettmers et al. 2022 (arXiv 2110.02861, section 2.1); double quantization, QLoRA
(arXiv 2305.14314, section 3). Formula: q_i = nearest level of the dynamic code to x_i / absmax(block of i).
Follows bitsandbytes' CPU build to the last bit: it looks a value up in a table of 65,536 cells, where the papers and
the CUDA kernels search the nearest level. A cell is 3e-5 of the block's absmax wide: about 0.15 % of Gaussian values
get the neighbouring level, and the levels below one cell are never chosen, so that 0 comes back as 2e-5 * absmax.
Leaves out: stochastic rounding. In production: `bitsandbytes.functional.quantize_blockwise`.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from finetune_lab.methods.codebooks import blocks, dynamic_code, nearest

CELLS = 2**16
SMALLEST = torch.finfo(torch.float32).tiny  # the smallest normal number: its reciprocal is still finite


@cache
def _tables(signed: bool) -> tuple[Tensor, Tensor]:
    """The dynamic code (256,) fp32, and the level of every cell's grid point 2 i / 65535 - 1 (65536,) uint8."""
    code = dynamic_code(signed)
    return code, nearest(torch.arange(CELLS) * (2 / (CELLS - 1)) - 1, code)


def quantize_blockwise(x: Tensor, signed: bool = True, blocksize: int = 256) -> tuple[Tensor, Tensor]:
    """Codes (uint8, shape of x) and absmax (ceil(n / blocksize),) fp32 of any float tensor; unsigned for x >= 0.

    A block of zeros gets code 0 and absmax 0, so that it comes back as zeros.
    """
    x_blocks = blocks(x, blocksize)
    absmax = x_blocks.abs().amax(1)
    scaled = x_blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]
    cells = scaled.add_(1).mul_((CELLS - 1) / 2).add_(0.5).clamp_(0, CELLS - 1).int()
    codes = _tables(signed)[1].to(x.device).index_select(0, cells.flatten()).view(x_blocks.shape)
    codes.masked_fill_((absmax == 0)[:, None], 0)
    return codes.flatten()[: x.numel()].view(x.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool = True, blocksize: int = 256) -> Tensor:
    """code[codes] * absmax of the block, fp32, in the shape of `codes`."""
    levels = _tables(signed)[0].to(codes.device).index_select(0, codes.flatten().int())
    return (blocks(levels, blocksize) * absmax[:, None]).flatten()[: codes.numel()].view(codes.shape)


@dataclass(frozen=True)
class Scales:
    """Block scales in 8 bits: codes (blocks,) uint8, absmax (ceil(blocks / blocksize),) fp32, offset () fp32."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes


def double_quantize(absmax: Tensor, blocksize: int = 256) -> Scales:
    """Quantise the scales (blocks,) fp32 themselves. All are positive: their mean is taken off first, so that the signed
    code is used on both sides of zero."""
    offset = absmax.mean()
    codes, second = quantize_blockwise(absmax - offset, blocksize=blocksize)
    return Scales(codes, second, offset, blocksize)


def restore_scales(scales: Scales) -> Tensor:
    """The block scales (blocks,) fp32 that `double_quantize` kept, each off by at most about 1 % of its block's spread."""
    return dequantize_blockwise(scales.codes, scales.absmax, blocksize=scales.blocksize) + scales.offset
