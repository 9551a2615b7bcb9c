"""A linear layer over a weight in 4 bits as one product that decodes within its tiles (QLoRA, arXiv:2305.14314).

A tile of the weight is a block of 64 columns of some rows: 32 bytes each, whose lower halves are the even columns. So
a product is two, over even and odd columns, and no lane moves. What is decoded is rounded to the type of x, as the
reference does, and added up in fp32. For types of 16 bits: fp32 would leave the tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels import nf4
from memopt.kernels.gpu.nf4 import table
from memopt.kernels.nf4 import BLOCK

TYPES = (torch.bfloat16, torch.float16)
ROWS, WIDE = 64, 32  # of x or the gradient, and of the weight, a program's tile
WORTH = 8  # tiles of rows up to which decoding in each moves fewer bytes than a decoded weight, written and read once


@triton.jit
def decoded(codes, s, levels, byte, block, live, half: tl.constexpr, like):
    """The even (half 0) or odd columns of a block of some rows, in the type of `like`."""
    code = tl.load(codes + byte, mask=live[:, None], other=0).to(tl.int32)
    size = tl.load(s + block, mask=live, other=0.0)
    level = tl.load(levels + ((code >> (4 * half)) & 15))
    return (level * size[:, None]).to(like.dtype.element_ty)


@triton.jit
def forward_kernel(
    x, codes, s, levels, bias, out, count, rows, columns,
    BIASED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of x W^T + bias. rows, columns: of W."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    pair = tl.arange(0, BLOCK // 2)
    here, live = at < count, row < rows
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for first in range(0, columns, BLOCK):
        byte = (row * (columns // 2) + first // 2)[:, None] + pair[None, :]
        block = row * (columns // BLOCK) + first // BLOCK
        for half in tl.static_range(2):
            some = tl.load(
                x + (at * columns + first)[:, None] + (2 * pair + half)[None, :], mask=here[:, None], other=0.0
            )
            weight = decoded(codes, s, levels, byte, block, live, half, x)
            total = tl.dot(some, tl.trans(weight), total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)[None, :]
    place = (at * rows)[:, None] + row[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=here[:, None] & live[None, :])


@triton.jit
def backward_kernel(
    grad, codes, s, levels, out, count, rows, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of columns of grad W."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1).to(tl.int64) * BLOCK
    pair = tl.arange(0, BLOCK // 2)
    here = at < count
    even = tl.zeros((ROWS, BLOCK // 2), tl.float32)
    odd = tl.zeros((ROWS, BLOCK // 2), tl.float32)
    for begin in range(0, rows, WIDE):
        row = begin + tl.arange(0, WIDE).to(tl.int64)
        live = row < rows
        some = tl.load(grad + (at * rows)[:, None] + row[None, :], mask=here[:, None] & live[None, :], other=0.0)
        byte = (row * (columns // 2) + first // 2)[:, None] + pair[None, :]
        block = row * (columns // BLOCK) + first // BLOCK
        even = tl.dot(some, decoded(codes, s, levels, byte, block, live, 0, grad), even, input_precision="ieee")
        odd = tl.dot(some, decoded(codes, s, levels, byte, block, live, 1, grad), odd, input_precision="ieee")
    place = (at * columns + first)[:, None] + 2 * pair[None, :]
    tl.store(out + place, even.to(out.dtype.element_ty), mask=here[:, None])
    tl.store(out + place + 1, odd.to(out.dtype.element_ty), mask=here[:, None])


def worth_it(x: Tensor) -> bool:
    """Whether for these rows decoding in tiles moves fewer bytes than decoding before: half a byte an element for each
    tile of rows, where a decoded weight in 16 bits is written and read, and its codes read, once."""
    return x.dtype in TYPES and triton.cdiv(len(x), ROWS) <= WORTH


def forward(x: Tensor, packed: Tensor, bias: Tensor | None, size: Sequence[int]) -> Tensor:
    """x W^T + bias of a matrix x."""
    rows, columns = size
    out = x.new_empty(len(x), rows)
    if out.numel():
        grid = (triton.cdiv(len(x), ROWS), triton.cdiv(rows, WIDE))
        forward_kernel[grid](
            x.contiguous(), nf4.split(packed)[2], nf4.sizes(packed), table(x.device), x if bias is None else bias, out,
            len(x), rows, columns, BIASED=bias is not None, **CONSTANTS,
        )  # fmt: skip
    return out


def backward(grad: Tensor, packed: Tensor, size: Sequence[int]) -> Tensor:
    """grad W of a matrix grad."""
    rows, columns = size
    out = grad.new_empty(len(grad), columns)
    if out.numel():
        backward_kernel[(triton.cdiv(len(grad), ROWS), columns // BLOCK)](
            grad.contiguous(), nf4.split(packed)[2], nf4.sizes(packed), table(grad.device), out,
            len(grad), rows, columns, **CONSTANTS,
        )  # fmt: skip
    return out


CONSTANTS = {"BLOCK": BLOCK, "ROWS": ROWS, "WIDE": WIDE, "num_warps": 8, "num_stages": 2}
_TYPES = {"codes": "*u8", "s": "*fp32", "levels": "*fp32", "count": "i64", "rows": "i64", "columns": "i64"}
BUILDS: dict[str, Any] = {
    name: build
    for kind in ("bf16", "fp16")
    for name, build in {
        f"linear_nf4_{kind}": (
            forward_kernel,
            {"x": f"*{kind}", "bias": f"*{kind}", "out": f"*{kind}", **_TYPES},
            {"BIASED": True, **CONSTANTS},
        ),
        f"linear_nf4_backward_{kind}": (
            backward_kernel,
            {"grad": f"*{kind}", "out": f"*{kind}", **_TYPES},
            CONSTANTS,
        ),
    }.items()
}
