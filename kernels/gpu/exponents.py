"""Coded exponents, read on a GPU: the layout of memopt.kernels.exponents. Packing happens once, by the reference."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.exponents import BLOCK, MEANS, WORDS, ZERO, amend, itemsize_of, pack, shift_of, split

__all__ = ["BUILDS", "pack", "unpack"]

ROWS = 8  # blocks a program


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
BUILDS: dict[str, Any] = {
    f"unpack_exponents_{8 * size}": (
        unpack_kernel,
        {**SIGNATURE, "out": f"*i{8 * size}"},
        {"SHIFT": 8 * size - 9, "ZERO": ZERO, "BLOCK": BLOCK, "ROWS": ROWS},
    )
    for size in MEANS
}
