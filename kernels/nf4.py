"""Weights in 4 bits: NormalFloat with double quantisation (QLoRA, Dettmers et al., arXiv:2305.14314). Lossy, nearest.

A block of 64 elements in memory order keeps s, about its max |x|, and each element the code of the level nearest to
x / s. The 16 levels are quantiles of a normal distribution in [-1, 1], seven below 0, 0 itself and eight above. The s
of all blocks less their mean are in e4m3, by groups of 256 (memopt/kernels/fp8.py). Codes are of the s that is read
back, so what that is off by is no error of its own. 4.13 bits an element.
Layout: 4 bytes (the mean), the s in e4m3, then the codes of whole blocks, the lower half of a byte first.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from memopt.kernels import fp8
from memopt.kernels.codec import at, chunks, register

BLOCK = 64
EACH = 256  # blocks at a time
OUTERMOST = 1 - (1 / 32 + 1 / 30) / 2  # the quantile that is 1: halfway into the last of 16, and of 15, equal shares


def nbytes(count: int) -> int:
    """Bytes for so many elements: whole blocks."""
    blocks = -(-count // BLOCK)
    return 4 + fp8.nbytes(blocks) + blocks * BLOCK // 2


@lru_cache(maxsize=1)
def levels() -> tuple[float, ...]:
    """What codes stand for, ascending."""
    below, above = _quantiles(8), _quantiles(9)
    return (*(-level for level in below), 0.0, *reversed(above))


def _quantiles(count: int) -> list[float]:
    """Those of even shares from OUTERMOST to the middle, which is left out, as parts of the first."""
    shares = torch.linspace(OUTERMOST, 0.5, count, dtype=torch.float64, device="cpu")[:-1]
    found = torch.special.ndtri(shares)
    return [float(value) for value in (found / found[0])]


def pack(x: Tensor) -> Tensor:
    """Scales and codes of flat values, which must be finite."""
    blocks = -(-x.numel() // BLOCK)
    largest = x.new_empty((blocks,), dtype=torch.float32)
    for part in chunks(blocks, EACH):
        largest[part] = _rows(x, part).abs().amax(1)
    out = x.new_empty((nbytes(x.numel()),), dtype=torch.uint8)
    mean, scales, codes = split(out)
    mean.copy_(largest.mean() if blocks else torch.zeros(()))
    scales.copy_(at(largest, fp8.pack)(largest.sub_(mean)))
    values = torch.tensor(levels(), device=x.device)
    edges, s = (values[1:] + values[:-1]) / 2, sizes(out)
    for part in chunks(blocks, EACH):
        found = torch.bucketize(_rows(x, part).div_(s[part, None]), edges, out_int32=True).to(torch.uint8)
        codes[part] = found[:, ::2] | found[:, 1::2] << 4
    return out


def unpack(packed: Tensor, out: Tensor) -> None:
    """Write s times the codes' levels."""
    read(sizes(packed), split(packed)[2], out)


def read(s: Tensor, codes: Tensor, out: Tensor) -> None:
    """The same of some blocks: their s, their codes, a row a block, and what they stand for."""
    values = torch.tensor(levels(), device=codes.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)  # by what a byte holds
    for part in chunks(codes.shape[0], EACH):
        rows = pairs.index_select(0, codes[part].view(-1).int()).view(-1, BLOCK).mul_(s[part, None]).view(-1)
        into = out[part.start * BLOCK : part.stop * BLOCK]
        into.copy_(rows[: into.numel()])


def split(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the mean of s, one fp32; of s in e4m3; and of the codes, a row a block."""
    each, held = 1 + BLOCK // 2, packed.numel() - 4
    blocks = (held - 4 * -(-held // (fp8.GROUP * each + 4))) // each
    mean, scales, codes = packed.split((4, fp8.nbytes(blocks), blocks * BLOCK // 2))
    return mean.view(torch.float32), scales, codes.view(blocks, BLOCK // 2)


def sizes(packed: Tensor) -> Tensor:
    """The s of every block, fp32, above 0."""
    mean, scales, codes = split(packed)
    s = mean.new_empty((codes.shape[0],))
    at(scales, fp8.unpack)(scales, s)
    return s.add_(mean).clamp_(min=fp8.SMALLEST)


def _rows(x: Tensor, part: slice) -> Tensor:
    """These blocks in fp32, a copy; what is missing of the last one is 0."""
    values = x[part.start * BLOCK : part.stop * BLOCK].to(torch.float32, copy=True)
    missing = (part.stop - part.start) * BLOCK - values.numel()
    return torch.cat((values, values.new_zeros(missing))).view(-1, BLOCK) if missing else values.view(-1, BLOCK)


register("nf4", pack, unpack, nbytes)
