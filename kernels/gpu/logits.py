"""The passes over a chunk of logits between its products, on a GPU: each reads the chunk once, in the products' type.

    l = scale x, or cap tanh(scale x) where there is a cap            x: the chunk, (rows, columns), rows n, words v
    top_n = max_v l_nv      powers_n = sum_v exp(l_nv - top_n)        so far, one chunk of words after another
    x_nv <- (exp(l_nv - shift_n) by_powers_n + by_each_n + [v = target_n] by_chosen_n) d l_nv / d x_nv

The running maximum and the sum that is scaled as it grows are of Milakov and Gimelshein (arXiv:1805.02867). All is
computed in fp32 and rounded once, as it is stored. No copy of the chunk in fp32 is made: below fp32 a bias's gradient
is the sum of rounded ones, as a linear layer's in that type is.

Rows of a chunk as `logits.product` makes it begin a multiple of 16 bytes apart, and what lies between a row's end and
the next multiple is read and written too: so a thread moves 16 bytes at a time, whatever the number of words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.logits import LINE

EACH = 2048  # elements a program at a time: of one row, or of as many as are that short
SHORTEST = 256  # columns of them
WARPS = 4


class Sums(NamedTuple):
    """What was read so far: (rows,) each, fp32."""

    top: Tensor
    powers: Tensor
    chosen: Tensor
    total: Tensor

    def lse(self) -> Tensor:
        """Log of each row's sum of exponentials."""
        return self.powers.log() + self.top

    def of(self, rows: slice) -> Sums:
        """Those of some rows, to be added to."""
        return Sums(*(each[rows] for each in self))


def nothing(rows: int, like: Tensor) -> Sums:
    """Sums before the first chunk."""
    top = like.new_full((rows,), -torch.inf, dtype=torch.float32)
    return Sums(top, *(torch.zeros_like(top) for _ in range(3)))


@triton.jit
def power(x, NEAR: tl.constexpr):
    """exp(x). NEAR: 2^n times a polynomial in x - n ln 2, as Cephes' expf (Moshier, 1989), off by a rounding or
    two. The GPU's own rounds x / ln 2 first and is off by |x| of them, which 16 bits do not show."""
    if not NEAR:
        return tl.exp(x)
    x = tl.where(x < -104.0, -104.0, x)  # which is 0 already; NaN stays
    whole = tl.floor(x * 1.44269504 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4  # ln 2 in two parts
    made = (1.9875691500e-4 * rest + 1.3981999507e-3) * rest + 8.3334519073e-3
    made = ((made * rest + 4.1665795894e-2) * rest + 1.6666665459e-1) * rest + 5.0000001201e-1
    return ((made * rest) * rest + rest + 1.0) * tl.exp2(whole)


@triton.jit
def tangent(x):
    """tanh(x), at most 1e-7 of it off and 3e-8 as a rule: below 1 by x + x^3 P(x^2), which meets tanh at the seven
    Chebyshev nodes of x^2, for 1 - 2 / (e^2x + 1) has lost digits there."""
    size = tl.abs(x)
    size = tl.where(size > 10.0, 10.0, size)  # which is 1 already; NaN stays
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    square = size * size
    near = (-0.000420695494 * square + 0.00251045933) * square - 0.0082189219
    near = ((near * square + 0.0216601154) * square - 0.0539347889) * square + 0.133331285
    near = (near * square - 0.333333313) * square * size + size
    found = tl.where(size < 1.0, near, far)
    return tl.where(x < 0.0, -found, found)


@triton.jit
def logit(x, scale, cap):
    """Of a product; cap: None for none."""
    made = x.to(tl.float32) * scale
    if cap is not None:
        made = tangent(made) * cap
    return made


@triton.jit(do_not_specialize=["first", "rows", "columns"])
def sums_kernel(
    made, targets, top, powers, chosen, total, first, rows, columns, lines, scale, cap,
    LINE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a chunk to some rows' sums. first: its first word; lines: of LINE elements, from a row to the next."""
    near: tl.constexpr = made.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    begin = made + row * (lines * LINE)
    wide = tl.cdiv(columns, LINE) * LINE
    high = tl.load(top + row, mask=here, other=float("-inf"))
    sum_of_powers = tl.load(powers + row, mask=here, other=0.0)
    sum_of_all = tl.zeros((ROWS,), tl.float32)
    for at in range(0, columns, BLOCK):
        column = at + tl.arange(0, BLOCK)
        x = tl.load(begin[:, None] + column[None, :], mask=here[:, None] & (column < wide)[None, :], other=0.0)
        live = (column < columns)[None, :]
        some = tl.where(live, logit(x, scale, cap), float("-inf"))
        before, high = high, tl.maximum(high, tl.max(some, 1))
        shift = tl.where(high == float("-inf"), 0.0, high)  # words that are all hidden add nothing
        new = tl.sum(power(some - shift[:, None], near), 1)
        sum_of_powers = sum_of_powers * power(before - shift, near) + new
        if total is not None:
            sum_of_all += tl.sum(tl.where(live, some, 0.0), 1)
    tl.store(top + row, high, mask=here)
    tl.store(powers + row, sum_of_powers, mask=here)
    if total is not None:
        tl.store(total + row, tl.load(total + row, mask=here, other=0.0) + sum_of_all, mask=here)
    if targets is not None:
        place = tl.load(targets + row, mask=here, other=-1) - first
        inside = here & (place >= 0) & (place < columns)
        right = logit(tl.load(begin + place, mask=inside, other=0.0), scale, cap)
        tl.store(chosen + row, tl.load(chosen + row, mask=inside, other=0.0) + right, mask=inside)


@triton.jit(do_not_specialize=["first", "rows", "columns"])
def slopes_kernel(
    made, targets, shift, by_powers, by_chosen, by_each, first, rows, columns, lines, scale, cap,
    LINE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's products in their place. first, lines: as above."""
    near: tl.constexpr = made.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    place = (made + row * (lines * LINE))[:, None] + column[None, :]
    moved = here[:, None] & (column < tl.cdiv(columns, LINE) * LINE)[None, :]
    some = tl.load(place, mask=moved, other=0.0).to(tl.float32) * scale
    bend = scale
    if cap is not None:
        share = tangent(some)
        some = share * cap
        bend = (1.0 - share) * (1.0 + share) * (cap * scale)
    slope = tl.zeros((ROWS, BLOCK), tl.float32)
    if by_powers is not None:
        factor = tl.load(by_powers + row, mask=here, other=0.0)
        slope = power(some - tl.load(shift + row, mask=here, other=0.0)[:, None], near) * factor[:, None]
    if by_each is not None:
        slope += tl.load(by_each + row, mask=here, other=0.0)[:, None]
    if by_chosen is not None:
        word = tl.load(targets + row, mask=here, other=-1) - first
        word = tl.where(word < columns, word, -1).to(tl.int32)
        extra = tl.load(by_chosen + row, mask=here, other=0.0)
        slope += tl.where(column[None, :] == word[:, None], extra[:, None], 0.0)
    tl.store(place, (slope * bend).to(made.dtype.element_ty), mask=moved)


def add_to_sums(
    made: Tensor, first: int, targets: Tensor | None, sums: Sums, summed: bool, scale: float = 1.0, cap: float = 0.0
) -> None:
    """Add a chunk (rows, columns) of the words from `first` on to its rows' sums, in place: one reading.

    targets: (rows,) words of the whole vocabulary, None where none is chosen. summed: whether the total is wanted.
    cap: 0.0 for none.
    """
    total = sums.total if summed else None
    _launch(sums_kernel, made, (targets, sums.top, sums.powers, sums.chosen, total), first, scale, cap)


def to_slopes(
    made: Tensor, first: int, targets: Tensor | None, shift: Tensor, by_powers: Tensor | None,
    by_chosen: Tensor | None, by_each: Tensor | None, scale: float = 1.0, cap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The chunk, whose products became their gradients (the formula above): one reading and one writing.

    shift and by_*: (rows,) in fp32, None for 0; targets, cap: as above.
    """
    by_chosen = None if targets is None else by_chosen
    _launch(slopes_kernel, made, (targets, shift, by_powers, by_chosen, by_each), first, scale, cap)
    return made


def _launch(
    kernel: Any, made: Tensor, of_rows: tuple[Tensor | None, ...], first: int, scale: float, cap: float
) -> None:
    """Over all rows; the kernel that writes, over all columns besides."""
    rows, columns = made.shape
    if not made.numel():
        return
    block = min(EACH, max(SHORTEST, triton.next_power_of_2(columns)))
    line = LINE // made.element_size()
    line = 1 if made.stride(0) % line else line
    across = triton.cdiv(columns, block) if kernel is slopes_kernel else 1
    dense = [each if each is None else each.contiguous() for each in of_rows]  # gradients may be expanded numbers
    with torch.cuda.device_of(made):  # Triton launches on the current device
        kernel[(triton.cdiv(rows, EACH // block), across)](
            made, *dense, first, rows, columns, made.stride(0) // line, scale, cap or None,
            LINE=line, ROWS=EACH // block, BLOCK=block, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


_TYPES = {
    **dict.fromkeys({*sums_kernel.arg_names, *slopes_kernel.arg_names}, "*fp32"),
    **{"made": "*T", "targets": "*i64", "scale": "fp32", "cap": "fp32"},
    **{"first": "i64", "rows": "i64", "columns": "i32", "lines": "i32"},
}
_LONG = {"cap": None, "LINE": 8, "ROWS": 1, "BLOCK": EACH, "num_warps": WARPS}
_SHORT = {"LINE": 8, "ROWS": EACH // SHORTEST, "BLOCK": SHORTEST, "num_warps": WARPS}  # and with a cap
BUILDS: dict[str, Any] = {
    f"logits_{name}_{form}": (kernel, {arg: _TYPES[arg] for arg in kernel.arg_names if arg not in given}, given)
    for name, kernel in (("sums", sums_kernel), ("slopes", slopes_kernel))
    for form, given in (("long", _LONG), ("short", _SHORT))
}
