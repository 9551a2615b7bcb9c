"""Values in 8, 4 or 2 bits by groups, on a GPU: the layout, the noise and the arithmetic of memopt.kernels.quantise.

A program packs whole groups: their extremes in a first reading, their codes in a second, which the cache serves. The
elements that share a byte are `SHARE` strided readings, so that a byte is joined without moving lanes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.quantise import BITS, CHUNK, CODECS, GROUP, SMALLEST, TURN, nbytes, noise, place

EACH = 1024  # elements a program


@triton.jit
def pack_kernel(
    x, terms, codes, noise, start, count, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, TURN: tl.constexpr, SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """(lo, s) of each of `groups` to `terms`, floor((x - lo) / s + u) to `codes`, `SHARE` to a byte."""
    SHARE: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, GROUP // SHARE) * SHARE
    inside = (row * GROUP)[:, None] + column[None, :]
    low = tl.full((ROWS,), float("inf"), tl.float32)
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    wrong = tl.full((ROWS,), 0, tl.int32)
    for part in tl.static_range(SHARE):
        value = tl.load(x + tl.minimum(inside + part, count - 1)).to(tl.float32)
        low = tl.minimum(low, tl.min(value, 1))
        high = tl.maximum(high, tl.max(value, 1))
        wrong += tl.sum((value != value).to(tl.int32), 1)
    low = tl.where(wrong > 0, float("nan"), low)
    step = tl.div_rn(high - low, tl.full((ROWS,), LEVELS, tl.float32))
    wide = step >= SMALLEST
    inverse = tl.where(wide, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.where(wide, step, 1.0)), 0.0)
    live = row < groups
    tl.store(terms + row * 2, low, mask=live)
    tl.store(terms + row * 2 + 1, step, mask=live)
    turned = (tl.load(start) + row * GROUP // CHUNK * TURN) % CHUNK + row * GROUP % CHUNK
    joined = tl.full((ROWS, GROUP // SHARE), 0, tl.int32)
    for part in tl.static_range(SHARE):
        value = tl.load(x + tl.minimum(inside + part, count - 1)).to(tl.float32)
        u = tl.load(noise + turned[:, None] + column[None, :] + part)
        q = tl.floor((value - low[:, None]) * inverse[:, None] + u)
        q = tl.minimum(tl.maximum(q, 0.0), LEVELS).to(tl.int32)
        joined |= q << (BITS * part)
    byte = (row * (GROUP // SHARE))[:, None] + (column // SHARE)[None, :]
    tl.store(codes + byte, joined.to(tl.uint8), mask=live[:, None])


@triton.jit
def unpack_kernel(
    terms, codes, out, count, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lo + q s for each of `count` elements."""
    SHARE: tl.constexpr = 8 // BITS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, GROUP // SHARE)
    live = row < groups
    low = tl.load(terms + row * 2, mask=live, other=0.0)
    step = tl.load(terms + row * 2 + 1, mask=live, other=0.0)
    byte = (row * (GROUP // SHARE))[:, None] + column[None, :]
    code = tl.load(codes + byte, mask=live[:, None], other=0).to(tl.int32)
    for part in tl.static_range(SHARE):
        q = ((code >> (BITS * part)) & ((1 << BITS) - 1)).to(tl.float32)
        at = (row * GROUP)[:, None] + (column * SHARE)[None, :] + part
        value = q * step[:, None] + low[:, None]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


def parts(packed: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The groups' parameters and their codes."""
    return packed[: groups * 8].view(torch.float32), packed[groups * 8 :]


def pack(x: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Parameters and codes of flat values. The noise begins where the values say, which the host never learns."""
    groups = triton.cdiv(x.numel(), group)
    out = x.new_empty((nbytes(x.numel(), bits, group),), dtype=torch.uint8)
    if groups:
        terms, codes = parts(out, groups)
        pack_kernel[(triton.cdiv(x.numel(), EACH),)](
            x, terms, codes, noise(x.device), place(x), x.numel(), groups,
            **_packing(bits, group), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def unpack(packed: Tensor, out: Tensor, bits: int, group: int = GROUP) -> None:
    """Write lo + q s."""
    if groups := triton.cdiv(out.numel(), group):
        terms, codes = parts(packed, groups)
        unpack_kernel[(triton.cdiv(out.numel(), EACH),)](
            terms, codes, out, out.numel(), groups, **_unpacking(bits, group), enable_fp_fusion=False
        )


def _unpacking(bits: int, group: int) -> dict[str, int]:
    """The constants of what unpacks."""
    return {"BITS": bits, "GROUP": group, "ROWS": EACH // group}


def _packing(bits: int, group: int) -> dict[str, Any]:
    """The constants of what packs."""
    return {**_unpacking(bits, group), "CHUNK": CHUNK, "TURN": TURN, "SMALLEST": SMALLEST}


_TYPES = {"terms": "*fp32", "codes": "*u8", "count": "i64", "groups": "i64"}
BUILDS: dict[str, Any] = {
    name: build
    for codec in (*BITS, "int4_64", "int8_16")  # the other widths are built alike
    for name, build in {
        f"pack_{codec}": (
            pack_kernel,
            {"x": "*T", "noise": "*fp32", "start": "*i64", **_TYPES},
            _packing(*CODECS[codec]),
        ),
        f"unpack_{codec}": (unpack_kernel, {"out": "*T", **_TYPES}, _unpacking(*CODECS[codec])),
    }.items()
}
