"""Trained weights in 8 bits by even steps, moved on a GPU: the layout and the arithmetic of memopt.kernels.steps.

A program moves whole groups: what stood there, what is written, their extremes and new codes in one reading.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.quantise import CHUNK, GROUP, SMALLEST, TURN
from memopt.kernels.steps import FULL, LEVELS, MARGIN, noise, parts, turned

ROWS = 4  # groups a program


@triton.jit
def write_kernel(
    values, terms, codes, noise, start, count, groups,
    NEW: tl.constexpr, LEVELS: tl.constexpr, MARGIN: tl.constexpr, FULL: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, TURN: tl.constexpr, SMALLEST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Codes, and (lo, s) where a group needs new ones, of `count` values in the place of those that are there."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, GROUP)
    live = row < groups
    at = (row * GROUP)[:, None] + column[None, :]
    own = tl.minimum(at, count - 1)  # the last group is filled up with its own last value
    x = tl.load(values + own).to(tl.float32)
    low = tl.load(terms + row * 2, mask=live, other=0.0)
    step = tl.load(terms + row * 2 + 1, mask=live, other=0.0)
    if not NEW:
        stood = tl.load(codes + own).to(tl.float32) * step[:, None] + low[:, None]
        exact = tl.load(codes + at, mask=live[:, None], other=0).to(tl.float32) * step[:, None] + low[:, None]
        x = x - stood.to(values.dtype.element_ty).to(tl.float32) + exact
    wrong = tl.sum((x != x).to(tl.int32), 1) > 0
    least = tl.where(wrong, float("nan"), tl.min(x, 1))
    most = tl.where(wrong, float("nan"), tl.max(x, 1))
    wide = most - least
    fits = (least >= low) & (most <= low + LEVELS * step) & (wide >= FULL * (LEVELS * step))
    if NEW:
        fits = live & (row < 0)
    room = MARGIN * wide
    fresh = tl.div_rn(wide + 2 * room, tl.full((ROWS,), LEVELS, tl.float32))
    low = tl.where(fits, low, least - room)
    step = tl.where(fits, step, fresh)
    tl.store(terms + row * 2, low, mask=live)
    tl.store(terms + row * 2 + 1, step, mask=live)
    some = step >= SMALLEST
    inverse = tl.where(some, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.where(some, step, 1.0)), 0.0)
    begin = (start + row * GROUP // CHUNK * TURN) % CHUNK + row * GROUP % CHUNK
    u = tl.load(noise + begin[:, None] + column[None, :])
    q = tl.floor((x - low[:, None]) * inverse[:, None] + u)
    q = tl.minimum(tl.maximum(q, 0.0), LEVELS).to(tl.int32)
    tl.store(codes + at, q.to(tl.uint8), mask=live[:, None])


def write(packed: Tensor, values: Tensor, new: bool) -> None:
    """Put values in the place of those that are there; new: none are."""
    if groups := triton.cdiv(values.numel(), GROUP):
        terms, codes = parts(packed, groups)
        write_kernel[(triton.cdiv(groups, ROWS),)](
            values, terms, codes, noise(values.device), turned(packed, values, new), values.numel(), groups,
            NEW=new, **CONSTANTS, enable_fp_fusion=False,
        )  # fmt: skip


CONSTANTS: dict[str, Any] = {
    **{"LEVELS": LEVELS, "MARGIN": MARGIN, "FULL": FULL, "GROUP": GROUP},
    **{"CHUNK": CHUNK, "TURN": TURN, "SMALLEST": SMALLEST, "ROWS": ROWS},
}
SIGNATURE = {
    **{"values": "*T", "terms": "*fp32", "codes": "*u8", "noise": "*fp32"},
    **{"start": "i64", "count": "i64", "groups": "i64"},
}
BUILDS: dict[str, Any] = {
    f"{name}_steps": (write_kernel, SIGNATURE, {"NEW": new, **CONSTANTS})
    for name, new in (("write", False), ("pack", True))
}
