"""Coded exponents on a GPU: the layout of memopt.kernels.exponents, whose list torch makes and puts in its place."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.exponents import (
    BLOCK,
    FAR,
    MEANS,
    WORDS,
    ZERO,
    amend,
    itemsize_of,
    list_beyond,
    nbytes,
    shift_of,
    split,
)

ROWS = 8  # blocks a program


@triton.jit
def pack_kernel(
    x, largest, codes, rest, count, blocks, SHIFT: tl.constexpr, ZERO: tl.constexpr, FAR: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of bits, which are 0 beyond `count`: the largest exponent of each block, codes, signs and mantissas."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK // 2)
    live = row < blocks
    top = tl.zeros((ROWS,), tl.int32)
    for half in tl.static_range(2):
        at = (row * BLOCK)[:, None] + (column * 2)[None, :] + half
        word = tl.load(x + at, mask=at < count, other=0).to(tl.int32)
        top = tl.maximum(top, tl.max((word >> SHIFT) & 255, 1))
    tl.store(largest + row, top.to(tl.uint8), mask=live)
    joined = tl.zeros((ROWS, BLOCK // 2), tl.int32)
    for half in tl.static_range(2):
        at = (row * BLOCK)[:, None] + (column * 2)[None, :] + half
        inside = at < count
        word = tl.load(x + at, mask=inside, other=0).to(tl.int32)
        exponent = (word >> SHIFT) & 255
        below = top[:, None] - exponent
        code = tl.where(exponent == 0, ZERO, tl.where(below < ZERO, below, FAR))
        joined |= code << (4 * half)
        kept = ((word >> 8) & (1 << SHIFT)) | (word & ((1 << SHIFT) - 1))
        for part in tl.static_range((SHIFT + 1) // 8):
            byte = (kept >> (8 * part)) & 255
            tl.store(rest + at * ((SHIFT + 1) // 8) + part, byte.to(tl.uint8), mask=inside)
    byte = (row * (BLOCK // 2))[:, None] + column[None, :]
    tl.store(codes + byte, joined.to(tl.uint8), mask=live[:, None])


@triton.jit
def unpack_kernel(
    largest, codes, rest, out, count, blocks, SHIFT: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Sign and mantissa, and the exponent its code says, as bits, for each of `count` elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK // 2)
    live = row < blocks
    top = tl.load(largest + row, mask=live, other=0).to(tl.int32)
    byte = (row * (BLOCK // 2))[:, None] + column[None, :]
    code = tl.load(codes + byte, mask=live[:, None], other=0).to(tl.int32)
    for half in tl.static_range(2):
        at = (row * BLOCK)[:, None] + (column * 2)[None, :] + half
        inside = at < count
        below = (code >> (4 * half)) & 15
        exponent = tl.where(below == ZERO, 0, top[:, None] - below)
        kept = tl.zeros_like(below)
        for part in tl.static_range((SHIFT + 1) // 8):
            kept |= tl.load(rest + at * ((SHIFT + 1) // 8) + part, mask=inside, other=0).to(tl.int32) << (8 * part)
        sign = (kept >> SHIFT) & 1
        word = (sign << (SHIFT + 8)) | (exponent << SHIFT) | (kept & ((1 << SHIFT) - 1))
        tl.store(out + at, word.to(out.dtype.element_ty), mask=inside)


def pack(x: Tensor) -> Tensor:
    """The bytes of flat values. Raises ValueError where `suits` says no."""
    out = x.new_empty((nbytes(x.numel(), x.itemsize),), dtype=torch.uint8)
    _, largest, codes, rest, _ = split(out, x.numel(), x.itemsize)
    if blocks := triton.cdiv(x.numel(), BLOCK):
        words = x.view(WORDS[x.dtype])
        pack_kernel[(triton.cdiv(blocks, ROWS),)](
            words, largest, codes, rest, x.numel(), blocks,
            SHIFT=shift_of(x), ZERO=ZERO, FAR=FAR, BLOCK=BLOCK, ROWS=ROWS,
        )  # fmt: skip
        both = torch.stack((codes & 15, codes >> 4), -1).view(-1)
        list_beyond(out, x, (both == FAR).nonzero()[:, 0])
    return out


def unpack(packed: Tensor, out: Tensor) -> None:
    """Write the values that were packed, in what they were or converted to the type of `out`."""
    itemsize = itemsize_of(packed, out.numel())
    made = out if out.dtype == MEANS[itemsize] else out.new_empty(out.shape, dtype=MEANS[itemsize])
    _, largest, codes, rest, _ = split(packed, made.numel(), itemsize)
    if blocks := triton.cdiv(made.numel(), BLOCK):
        words = made.view(WORDS[made.dtype])
        unpack_kernel[(triton.cdiv(blocks, ROWS),)](
            largest, codes, rest, words, words.numel(), blocks, SHIFT=shift_of(made), ZERO=ZERO, BLOCK=BLOCK, ROWS=ROWS
        )
        amend(packed, made)
    if made is not out:
        out.copy_(made)


SIGNATURE = {"largest": "*u8", "codes": "*u8", "rest": "*u8", "count": "i64", "blocks": "i64"}
CONSTANTS = {"ZERO": ZERO, "BLOCK": BLOCK, "ROWS": ROWS}
BUILDS: dict[str, Any] = {
    name: build
    for size in MEANS
    for name, build in {
        f"pack_exponents_{8 * size}": (
            pack_kernel,
            {**SIGNATURE, "x": f"*i{8 * size}"},
            {"SHIFT": 8 * size - 9, "FAR": FAR, **CONSTANTS},
        ),
        f"unpack_exponents_{8 * size}": (
            unpack_kernel,
            {**SIGNATURE, "out": f"*i{8 * size}"},
            {"SHIFT": 8 * size - 9, **CONSTANTS},
        ),
    }.items()
}
