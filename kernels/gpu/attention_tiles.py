"""Tiles of attention's scores on a GPU: what the kernels of chunked_attention.py and attention_gradients.py share.

A tile is M queries by N keys of one head; scores are as memopt/kernels/chunked_attention.py has them. A term comes as
(where it begins, its steps over samples, heads, queries and keys, its fill); a step over queries or keys is None where
all are alike. A row of distances is a square whose step over queries is that over keys, backwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

ADDED, FILLS, REPLACES = 0, 1, 2  # kinds of terms; of the last, which a model added, the gradient goes on


@triton.jit
def tanh(x):
    """By a polynomial below 0.63, by exp above: off by at most 2e-7 of it, as fp32 has it."""
    z = x * x
    near = x + x * z * (-0.333333286 + z * (0.133327328 + z * (-0.0538449893 + z * (0.020968188 - 0.00605369856 * z))))
    t = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * t / (1.0 + t)
    return tl.where(tl.abs(x) < 0.63, near, tl.where(x < 0.0, -far, far))


@triton.jit
def begin(x, steps, sample, head):
    """Where a sample's head begins."""
    return x + sample.to(tl.int64) * steps[0] + head.to(tl.int64) * steps[1]


@triton.jit
def places(steps, row, width: tl.constexpr, count, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """(places, which are inside) of ROWS rows from `row` on, of `width` elements of WIDE; (ROWS, WIDE)."""
    i, j = tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = (row + i < count)[:, None]
    if width != WIDE:
        inside = inside & (j < width)[None, :]
    return row.to(tl.int64) * steps[2] + ((i * steps[2])[:, None] + (j * steps[3])[None, :]), inside


@triton.jit
def rows(x, steps, row, width: tl.constexpr, count, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """ROWS rows of a head from `row` on, 0 where there is nothing; (ROWS, WIDE)."""
    at, inside = places(steps, row, width, count, ROWS, WIDE)
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def part(term, sample, head, row, column, queries, keys, M: tl.constexpr, N: tl.constexpr):
    """What a tile reads of a term: (M | 1, N | 1)."""
    steps = term[1]
    at = begin(term[0], steps, sample, head) + tl.zeros((1, 1), tl.int32)
    inside = tl.full((1, 1), 1, tl.int1)
    if steps[2] is not None:
        i = tl.arange(0, M)
        at = at + row.to(tl.int64) * steps[2] + (i * steps[2])[:, None]
        inside = inside & (row + i < queries)[:, None]
    if steps[3] is not None:
        j = tl.arange(0, N)
        at = at + column.to(tl.int64) * steps[3] + (j * steps[3])[None, :]
        inside = inside & (column + j < keys)[None, :]
    return tl.load(at, mask=inside, other=0)


@triton.jit
def scored(
    mine, key, terms, window, numbers, sample, head, row, column, queries, keys, FORM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(scores of M queries and N keys, what each changes by with its product: 0 where a fill or the window is)."""
    KINDS: tl.constexpr = FORM[0]
    s = tl.dot(mine, tl.trans(key), input_precision="ieee")
    slope = numbers[1]
    if FORM[1]:
        bent = tanh(s * (numbers[1] / numbers[2]))
        s = bent * numbers[2]
        slope = slope * (1.0 - bent * bent)
    else:
        s = s * numbers[1]
    for at in tl.static_range(len(KINDS)):
        term = part(terms[at], sample, head, row, column, queries, keys, M, N)
        if KINDS[at] == 0:
            s = s + term.to(tl.float32)
        else:
            s = tl.where(term, s, terms[at][2])
            if KINDS[at] == 1:
                slope = tl.where(term, slope, 0.0)
    i, j = tl.arange(0, M), tl.arange(0, N)
    distance = (column - row) + (j[None, :] - i[:, None])
    beyond = tl.full((1, 1), 0, tl.int1)
    if window[0] is not None:
        beyond = beyond | (distance < -window[0])
    if window[1] is not None:
        beyond = beyond | (distance > window[1])
    if window[0] is not None or window[1] is not None:
        s = tl.where(beyond, numbers[0], s)
        if FORM[3]:
            slope = tl.where(beyond, 0.0, slope)
    return tl.where((column + j < keys)[None, :], s, float("-inf")), slope


@triton.jit
def seen(before, after, first, count, others, EACH: tl.constexpr, OTHER: tl.constexpr):
    """(first tile, number) of the `others` that EACH of `count` from `first` on see: so many before and after each."""
    low = 0 * first
    high = 0 * first + others
    if before is not None:
        low = tl.maximum(first - before, 0) // OTHER
    if after is not None:
        high = tl.minimum(tl.minimum(first + EACH, count) + after, others)
    return low, tl.maximum(tl.cdiv(high, OTHER) - low, 0)


@triton.jit
def blind(m, hidden):
    """Whether all that some row sees is as low as what is hidden from it, which then weighs as much."""
    return tl.max((m <= hidden / 2).to(tl.int32), 0)


@triton.jit
def others(m, numbers, row, queries, keys, first, count, M: tl.constexpr, N: tl.constexpr):
    """(first tile, number) of the tiles of keys after those, all round, if some row is blind to what those have."""
    some = blind(tl.where(row + tl.arange(0, M) < queries, m, float("inf")), numbers[0])
    return first + count, tl.where(some > 0, tl.cdiv(keys, N) - count, 0)


@triton.jit
def advanced(m, s):
    """(the rows' largest scores so far, what to subtract from scores, what sums so far shrink by)."""
    most = tl.maximum(m, tl.max(s, 1))
    base = tl.where(most == float("-inf"), 0.0, most)
    return most, base, tl.exp(m - base)
