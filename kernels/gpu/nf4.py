"""Weights in 4 bits, read on a GPU: the layout and the arithmetic of memopt.kernels.nf4.

A program reads whole blocks. The two elements that share a byte are two strided writes, so that no lane moves. Packing
happens once, by the reference.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.nf4 import BLOCK, levels, pack, sizes, split

__all__ = ["BUILDS", "pack", "read", "unpack"]

ROWS = 16  # blocks a program


@triton.jit
def unpack_kernel(s, codes, levels, out, count, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """s times its code's level for each of `count` elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK // 2)
    live = row < blocks
    size = tl.load(s + row, mask=live, other=0.0)
    byte = (row * (BLOCK // 2))[:, None] + column[None, :]
    code = tl.load(codes + byte, mask=live[:, None], other=0).to(tl.int32)
    for part in tl.static_range(2):
        level = tl.load(levels + ((code >> (4 * part)) & 15))
        at = (row * BLOCK)[:, None] + (column * 2)[None, :] + part
        tl.store(out + at, (level * size[:, None]).to(out.dtype.element_ty), mask=at < count)


@lru_cache(maxsize=8)
def table(device: torch.device) -> Tensor:
    """The levels, where they are read."""
    return torch.tensor(levels(), device=device)


def unpack(packed: Tensor, out: Tensor) -> None:
    """Write s times the codes' levels."""
    read(sizes(packed), split(packed)[2], out)


def read(s: Tensor, codes: Tensor, out: Tensor) -> None:
    """The same of some blocks."""
    if blocks := triton.cdiv(out.numel(), BLOCK):
        unpack_kernel[(triton.cdiv(blocks, ROWS),)](
            s, codes, table(codes.device), out, out.numel(), blocks, BLOCK=BLOCK, ROWS=ROWS
        )


BUILDS: dict[str, Any] = {
    "unpack_nf4": (
        unpack_kernel,
        {"s": "*fp32", "codes": "*u8", "levels": "*fp32", "out": "*T", "count": "i64", "blocks": "i64"},
        {"BLOCK": BLOCK, "ROWS": ROWS},
    )
}
