"""Attention in tiles on a GPU: scores stay in registers, forward and backward (FlashAttention, arXiv:2205.14135).

The formula is that of memopt/kernels/chunked_attention.py. A program of the forward takes some queries of a head and
goes over the keys they see, with a running largest score and sum (arXiv:1805.02867). The backward, which is given no
more than q, k, v and the terms, makes both again, and with them delta, the sum over keys of p dp. Then dq is summed
over keys, and dk and dv over queries and the heads of a group (attention_gradients.py): no two programs add up in one
place. Beside inputs and outputs the forward holds nothing, the backward three numbers in fp32 a query of each head.

Where terms may leave nothing of a row, what a window hides from it weighs as much as what it sees. Such a row is known
by its largest score, and goes over the other keys too. A row that sees nothing but -inf is NaN, as in the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.chunked_attention import joined
from memopt.kernels.gpu.attention_builds import Kernel, everywhere, more
from memopt.kernels.gpu.attention_calls import Call, takes
from memopt.kernels.gpu.attention_gradients import keys_kernel, queries_kernel
from memopt.kernels.gpu.attention_tiles import advanced, begin, blind, others, places, rows, scored, seen

__all__ = ["BUILDS", "MORE", "backward", "forward", "takes"]


@triton.jit
def forward_kernel(
    q, k, v, out, steps, terms, window, numbers, sizes, FORM: tl.constexpr, WIDTH: tl.constexpr, VALUE: tl.constexpr,
    E: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M rows of out."""
    heads, group, queries, keys = sizes
    each = tl.cdiv(queries, M)
    pair, row = tl.program_id(0) // each, tl.program_id(0) % each * M
    sample, head = pair // heads, pair % heads
    mine = rows(begin(q, steps[0], sample, head), steps[0], row, WIDTH, queries, M, E)
    k, v = begin(k, steps[1], sample, head // group), begin(v, steps[2], sample, head // group)
    m, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    made = tl.zeros((M, D), tl.float32)
    first, count = seen(window[0], window[1], row, queries, keys, M, N)
    for _ in range(2 if FORM[2] else 1):
        for at in range(0, count):
            column = (first + at) % tl.cdiv(keys, N) * N
            key = rows(k, steps[1], column, WIDTH, keys, N, E)
            s, _slope = scored(mine, key, terms, window, numbers, sample, head, row, column, queries, keys, FORM, M, N)
            m, base, shrink = advanced(m, s)
            p = tl.exp(s - base[:, None])
            total = total * shrink + tl.sum(p, 1)
            value = rows(v, steps[2], column, VALUE, keys, N, D)
            made = tl.dot(p.to(v.dtype.element_ty), value, made * shrink[:, None], input_precision="ieee")
        if FORM[2]:
            first, count = others(m, numbers, row, queries, keys, first, count, M, N)
    at, inside = places(steps[3], row, VALUE, queries, M, D)
    tl.store(begin(out, steps[3], sample, head) + at, (made / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def statistics_kernel(
    q, k, v, grad, bases, inverses, deltas, flags, steps, terms, window, numbers, sizes, FORM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, E: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Of M rows what p = exp(s - base) inverse is made of, and delta; a flag for each group that has a blind row."""
    heads, group, queries, keys = sizes
    each = tl.cdiv(queries, M)
    pair, row = tl.program_id(0) // each, tl.program_id(0) % each * M
    sample, head = pair // heads, pair % heads
    mine = rows(begin(q, steps[0], sample, head), steps[0], row, WIDTH, queries, M, E)
    above = rows(begin(grad, steps[3], sample, head), steps[3], row, VALUE, queries, M, D).to(v.dtype.element_ty)
    k, v = begin(k, steps[1], sample, head // group), begin(v, steps[2], sample, head // group)
    m, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    delta = tl.zeros((M,), tl.float32)
    first, count = seen(window[0], window[1], row, queries, keys, M, N)
    for _ in range(2 if FORM[2] else 1):
        for at in range(0, count):
            column = (first + at) % tl.cdiv(keys, N) * N
            key = rows(k, steps[1], column, WIDTH, keys, N, E)
            s, _slope = scored(mine, key, terms, window, numbers, sample, head, row, column, queries, keys, FORM, M, N)
            m, base, shrink = advanced(m, s)
            p = tl.exp(s - base[:, None])
            total = total * shrink + tl.sum(p, 1)
            value = rows(v, steps[2], column, VALUE, keys, N, D)
            dp = tl.dot(above, tl.trans(value), input_precision="ieee")
            delta = delta * shrink + tl.sum(p * dp, 1)
        if FORM[2]:
            first, count = others(m, numbers, row, queries, keys, first, count, M, N)
    at = pair.to(tl.int64) * queries + row + tl.arange(0, M)
    inside = row + tl.arange(0, M) < queries
    tl.store(bases + at, tl.where(m == float("-inf"), 0.0, m), mask=inside)
    tl.store(inverses + at, 1.0 / total, mask=inside)
    tl.store(deltas + at, delta / total, mask=inside)
    if FORM[2]:
        some = blind(tl.where(inside, m, float("inf")), numbers[0])
        tl.store(flags + pair // group, some, mask=some > 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, terms: Sequence[Tensor], fills: Sequence[float], by_distance: Sequence[bool],
    added: Sequence[bool], trained: Sequence[int], left: int | None, right: int | None, hidden: float,
    hidden_added: bool, scale: float, cap: float, dropout: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """out, of what `takes` takes."""
    call = Call(q, k, v, terms, fills, by_distance, added, left, right, hidden, hidden_added, scale, cap)
    out = joined(q, call.heads, call.value)
    steps = tuple(x.stride() for x in (q, k, v, out))
    forward_kernel[call.programs("forward")](q, k, v, out, steps, **call.given("forward"))
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Sequence[Tensor], fills: Sequence[float],
    by_distance: Sequence[bool], added: Sequence[bool], trained: Sequence[int], left: int | None, right: int | None,
    hidden: float, hidden_added: bool, scale: float, cap: float, dropout: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k and v, of what `takes` takes where nothing is trained."""
    call = Call(q, k, v, terms, fills, by_distance, added, left, right, hidden, hidden_added, scale, cap)
    dq, dk, dv = (joined(x, x.shape[1], x.shape[3]) for x in (q, k, v))
    flags = torch.zeros(call.samples * call.groups if call.blind else 1, dtype=torch.int32, device=q.device)
    told = q.new_empty((3, call.samples, call.heads, call.queries), dtype=torch.float32).unbind()
    given, steps = (q, k, v, grad, *told), tuple(x.stride() for x in (q, k, v, grad))
    statistics_kernel[call.programs("statistics")](*given, flags, steps, **call.given("statistics"))
    queries_kernel[call.programs("queries")](*given, dq, (*steps, dq.stride()), **call.given("queries"))
    keys_kernel[call.programs("keys")](*given, flags, dk, dv, (*steps, dk.stride(), dv.stride()), **call.given("keys"))
    return [dq, dk, dv]


INPUTS = ("q", "k", "v", "grad")
KERNELS = (
    Kernel("forward", forward_kernel, ("q", "k", "v", "out"), 4),
    Kernel("statistics", statistics_kernel, INPUTS, 4),
    Kernel("queries", queries_kernel, (*INPUTS, "dq"), 5),
    Kernel("keys", keys_kernel, (*INPUTS, "dk", "dv"), 6),
)
BUILDS: dict[str, Any] = {name: build for kernel in KERNELS for name, build in everywhere(kernel).items()}
MORE: dict[str, Any] = {name: build for kernel in KERNELS for name, build in more(kernel).items()}
