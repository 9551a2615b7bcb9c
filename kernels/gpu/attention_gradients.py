"""Gradients of attention in tiles on a GPU: ds = p (dp - delta) slope, dq = ds k, dk = ds' q, dv = p' dout.

p = exp(s - base) inverse is made again a tile at a time by what statistics_kernel of chunked_attention.py tells of each
query, and so is dp = dout v'; slope is what a score changes by with its product. Each sum is made by one program, in
fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memopt.kernels.gpu.attention_tiles import begin, blind, places, rows, scored, seen


@triton.jit
def told(bases, inverses, deltas, pair, row, queries, M: tl.constexpr):
    """(base, inverse, delta) of M queries; of those beyond the last such that p is 0."""
    at, inside = pair.to(tl.int64) * queries + row + tl.arange(0, M), row + tl.arange(0, M) < queries
    base = tl.load(bases + at, mask=inside, other=float("inf"))
    return base, tl.load(inverses + at, mask=inside, other=0.0), tl.load(deltas + at, mask=inside, other=0.0)


@triton.jit
def by_product(p, dp, delta, slope):
    """Gradient of a tile's products; 0 under a fill even where p is NaN, as in the reference."""
    ds = p * (dp - delta[:, None]) * slope
    return tl.where(slope == 0.0, 0.0, ds)


@triton.jit
def queries_kernel(
    q, k, v, grad, bases, inverses, deltas, dq, steps, terms, window, numbers, sizes, FORM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, E: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M rows of dq."""
    heads, group, queries, keys = sizes
    each = tl.cdiv(queries, M)
    pair, row = tl.program_id(0) // each, tl.program_id(0) % each * M
    sample, head = pair // heads, pair % heads
    mine = rows(begin(q, steps[0], sample, head), steps[0], row, WIDTH, queries, M, E)
    above = rows(begin(grad, steps[3], sample, head), steps[3], row, VALUE, queries, M, D).to(v.dtype.element_ty)
    k, v = begin(k, steps[1], sample, head // group), begin(v, steps[2], sample, head // group)
    base, inverse, delta = told(bases, inverses, deltas, pair, row, queries, M)
    total = tl.zeros((M, E), tl.float32)
    first, count = seen(window[0], window[1], row, queries, keys, M, N)
    if FORM[2]:
        every = blind(base, numbers[0]) > 0
        first, count = tl.where(every, 0, first), tl.where(every, tl.cdiv(keys, N), count)
    for at in range(0, count):
        column = (first + at) * N
        key = rows(k, steps[1], column, WIDTH, keys, N, E)
        s, slope = scored(mine, key, terms, window, numbers, sample, head, row, column, queries, keys, FORM, M, N)
        p = tl.exp(s - base[:, None]) * inverse[:, None]
        value = rows(v, steps[2], column, VALUE, keys, N, D)
        dp = tl.dot(above, tl.trans(value), input_precision="ieee")
        ds = by_product(p, dp, delta, slope).to(q.dtype.element_ty)
        total = tl.dot(ds, key, total, input_precision="ieee")
    at, inside = places(steps[4], row, WIDTH, queries, M, E)
    tl.store(begin(dq, steps[4], sample, head) + at, total.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def keys_kernel(
    q, k, v, grad, bases, inverses, deltas, flags, dk, dv, steps, terms, window, numbers, sizes, FORM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, E: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N rows of dk and dv, over the queries of all heads of a group."""
    heads, group, queries, keys = sizes
    each, groups = tl.cdiv(keys, N), heads // group
    pair, column = tl.program_id(0) // each, tl.program_id(0) % each * N
    sample, which = pair // groups, pair % groups
    key = rows(begin(k, steps[1], sample, which), steps[1], column, WIDTH, keys, N, E)
    value = rows(begin(v, steps[2], sample, which), steps[2], column, VALUE, keys, N, D)
    by_key, by_value = tl.zeros((N, E), tl.float32), tl.zeros((N, D), tl.float32)
    first, count = seen(window[1], window[0], column, keys, queries, N, M)
    if FORM[2]:
        every = tl.load(flags + pair) > 0
        first, count = tl.where(every, 0, first), tl.where(every, tl.cdiv(queries, M), count)
    for at in range(0, group * count):
        head, row = which * group + at // count, (first + at % count) * M
        mine = rows(begin(q, steps[0], sample, head), steps[0], row, WIDTH, queries, M, E)
        above = rows(begin(grad, steps[3], sample, head), steps[3], row, VALUE, queries, M, D).to(value.dtype)
        s, slope = scored(mine, key, terms, window, numbers, sample, head, row, column, queries, keys, FORM, M, N)
        base, inverse, delta = told(bases, inverses, deltas, sample * heads + head, row, queries, M)
        p = tl.exp(s - base[:, None]) * inverse[:, None]
        by_value = tl.dot(tl.trans(p.to(value.dtype)), above, by_value, input_precision="ieee")
        dp = tl.dot(above, tl.trans(value), input_precision="ieee")
        ds = by_product(p, dp, delta, slope).to(key.dtype)
        by_key = tl.dot(tl.trans(ds), mine, by_key, input_precision="ieee")
    at, inside = places(steps[4], column, WIDTH, keys, N, E)
    tl.store(begin(dk, steps[4], sample, which) + at, by_key.to(dk.dtype.element_ty), mask=inside)
    at, inside = places(steps[5], column, VALUE, keys, N, D)
    tl.store(begin(dv, steps[5], sample, which) + at, by_value.to(dv.dtype.element_ty), mask=inside)
