"""Booleans, eight to a byte, on a GPU: the layout of memopt.kernels.pack_bits, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.pack_bits import nbytes

BLOCK = 512  # packed bytes a program


@triton.jit
def pack_kernel(x, out, count, size, BLOCK: tl.constexpr):
    """Byte i of `out` is elements 8 i to 8 i + 7 of the `count` in x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    place = at[:, None] * 8 + bit[None, :]
    ones = tl.load(x + place, mask=place < count, other=0).to(tl.int32)
    tl.store(out + at, tl.sum(ones << bit[None, :], 1).to(tl.uint8), mask=at < size)


@triton.jit
def unpack_kernel(packed, out, count, size, BLOCK: tl.constexpr):
    """Element 8 i + j of `out` is bit j of byte i."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    byte = tl.load(packed + at, mask=at < size, other=0).to(tl.int32)
    place = at[:, None] * 8 + bit[None, :]
    tl.store(out + place, ((byte[:, None] >> bit[None, :]) & 1).to(tl.uint8), mask=place < count)


def pack(x: Tensor) -> Tensor:
    """Bits of flat booleans."""
    size = nbytes(x.numel())
    out = x.new_empty((size,), dtype=torch.uint8)
    if size:
        pack_kernel[(triton.cdiv(size, BLOCK),)](x.view(torch.uint8), out, x.numel(), size, BLOCK=BLOCK)
    return out


def unpack(packed: Tensor, out: Tensor) -> None:
    """Write the booleans of these bits."""
    if size := packed.numel():
        to = out.view(torch.uint8)
        unpack_kernel[(triton.cdiv(size, BLOCK),)](packed, to, out.numel(), size, BLOCK=BLOCK)


_TYPES = {"count": "i64", "size": "i64"}
BUILDS: dict[str, Any] = {
    "pack_bits": (pack_kernel, {"x": "*u8", "out": "*u8", **_TYPES}, {"BLOCK": BLOCK}),
    "unpack_bits": (unpack_kernel, {"packed": "*u8", "out": "*u8", **_TYPES}, {"BLOCK": BLOCK}),
}
