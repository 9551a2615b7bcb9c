"""Which stretch of a nonlinearity's slope a value lies in, on a GPU: the layout of memopt.kernels.fewbit, bit for bit.

Eight codes are one word of 24 or 16 bits, stored as its bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.fewbit import BITS, nbytes, table

BLOCK = 256  # eights a program


@triton.jit
def pack_kernel(
    x, borders, out, count, eights,
    BITS: tl.constexpr, BORDERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The number of `borders` below each element, eight to a word."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 8)
    place = at[:, None] * 8 + lane[None, :]
    value = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32)
    code = tl.full((BLOCK, 8), 0, tl.int32)
    for border in tl.static_range(BORDERS):
        code += (value > tl.load(borders + border)).to(tl.int32)
    code = tl.where(place < count, code, 0)
    word = tl.sum(code << (lane * BITS)[None, :], 1)
    for byte in tl.static_range(BITS):
        tl.store(out + at * BITS + byte, ((word >> (8 * byte)) & 0xFF).to(tl.uint8), mask=at < eights)


@triton.jit
def unpack_kernel(packed, points, out, count, eights, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The point of `points` that each code names."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 8)
    word = tl.full((BLOCK,), 0, tl.int32)
    for byte in tl.static_range(BITS):
        word |= tl.load(packed + at * BITS + byte, mask=at < eights, other=0).to(tl.int32) << (8 * byte)
    code = (word[:, None] >> (lane * BITS)[None, :]) & ((1 << BITS) - 1)
    place = at[:, None] * 8 + lane[None, :]
    tl.store(out + place, tl.load(points + code), mask=place < count)


def pack(x: Tensor, name: str) -> Tensor:
    """Codes of flat values."""
    borders = table(name, x.device)[0].to(x.dtype).float()  # as the reference, which compares in the type of x
    bits = BITS[name]
    out = x.new_empty((nbytes(x.numel(), bits),), dtype=torch.uint8)
    if eights := len(out) // bits:
        pack_kernel[(triton.cdiv(eights, BLOCK),)](
            x, borders, out, x.numel(), eights, BITS=bits, BORDERS=len(borders), BLOCK=BLOCK
        )
    return out


def unpack(packed: Tensor, out: Tensor, name: str) -> None:
    """Write a point for each value, at which f' is its level."""
    bits = BITS[name]
    if eights := len(packed) // bits:
        points = table(name, packed.device)[1].to(out.dtype)
        unpack_kernel[(triton.cdiv(eights, BLOCK),)](packed, points, out, out.numel(), eights, BITS=bits, BLOCK=BLOCK)


_TYPES = {"count": "i64", "eights": "i64"}
BUILDS: dict[str, Any] = {
    name: build
    for codec, bits in (("s2a", 4), ("fewbit", 3), ("approx", 2))
    for name, build in {
        f"pack_{codec}": (
            pack_kernel,
            {"x": "*T", "borders": "*fp32", "out": "*u8", **_TYPES},
            {"BITS": bits, "BORDERS": (1 << bits) - 1, "BLOCK": BLOCK},
        ),
        f"unpack_{codec}": (
            unpack_kernel,
            {"packed": "*u8", "points": "*T", "out": "*T", **_TYPES},
            {"BITS": bits, "BLOCK": BLOCK},
        ),
    }.items()
}
