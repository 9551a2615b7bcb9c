"""Values as 8-bit floats with a scale a group, on a GPU: the layout and the rounding of memopt.kernels.fp8.

The e4m3 of a number is made of its fp32 bits by integers, since no instruction does so before compute capability 8.9:
a normal one by rounding its mantissa to three bits, a denormal one (below 2^-6) by adding 2^14, whose last place is
2^-9, that of e4m3's denormals. Both round to nearest, ties to even, as the hardware does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.fp8 import GROUP, LARGEST, SMALLEST, nbytes
from memopt.kernels.gpu.functions import e4m3

ROWS = 4  # groups a program


@triton.jit
def _code(value):
    """The e4m3 of fp32 values whose magnitude is at most 448, as int32; NaN as 0x7F."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    denormal = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) & 0x7FFFFF
    code = tl.where(size < (121 << 23), denormal, normal)
    return tl.where(value != value, 0x7F, code | sign)


@triton.jit
def pack_kernel(
    x, scales, codes, count, groups,
    GROUP: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each group's scale, its largest magnitude over 448, and x / scale as e4m3."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (row * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    wrong = tl.sum((value != value).to(tl.int32), 1)
    largest = tl.max(tl.abs(value), 1)
    scale = tl.maximum(tl.div_rn(largest, tl.full((ROWS,), LARGEST, tl.float32)), SMALLEST)
    scale = tl.where(wrong > 0, float("nan"), scale)
    tl.store(scales + row, scale, mask=row < groups)
    scaled = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
    tl.store(codes + at, _code(scaled).to(tl.uint8), mask=at < count)


@triton.jit
def unpack_kernel(scales, codes, out, count, groups, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """e4m3 times its group's scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (row * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    scale = tl.load(scales + row, mask=row < groups, other=0.0)
    code = tl.load(codes + at, mask=at < count, other=0).to(tl.int32)
    value = e4m3(code) * scale[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


def parts(packed: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The groups' scales and their codes."""
    return packed[: groups * 4].view(torch.float32), packed[groups * 4 :]


def pack(x: Tensor) -> Tensor:
    """Scales and codes of flat values."""
    groups = triton.cdiv(x.numel(), GROUP)
    out = x.new_empty((nbytes(x.numel()),), dtype=torch.uint8)
    if groups:
        pack_kernel[(triton.cdiv(groups, ROWS),)](
            x, *parts(out, groups), x.numel(), groups, GROUP=GROUP, LARGEST=LARGEST, SMALLEST=SMALLEST, ROWS=ROWS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def unpack(packed: Tensor, out: Tensor) -> None:
    """Write the values again."""
    if groups := triton.cdiv(out.numel(), GROUP):
        terms = parts(packed, groups)
        grid = (triton.cdiv(groups, ROWS),)
        unpack_kernel[grid](*terms, out, out.numel(), groups, GROUP=GROUP, ROWS=ROWS, enable_fp_fusion=False)


_TYPES = {"scales": "*fp32", "codes": "*u8", "count": "i64", "groups": "i64"}
_SIZES = {"GROUP": GROUP, "ROWS": ROWS}
BUILDS: dict[str, Any] = {
    "pack_fp8": (pack_kernel, {"x": "*T", **_TYPES}, {"LARGEST": LARGEST, "SMALLEST": SMALLEST, **_SIZES}),
    "unpack_fp8": (unpack_kernel, {"out": "*T", **_TYPES}, _SIZES),
}
