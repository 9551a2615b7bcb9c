"""Logits, a linear layer's outputs over a large vocabulary, of which only a chunk exists at a time.

    logits = hidden weight^T + bias                     hidden (N, H), weight (V, H), bias (V)

fp32 is chunked by rows. Below fp32 the weight's gradient would then be rounded once a chunk, or be summed in twice its
bytes; there chunks are of the vocabulary, whose gradients are whole. Logits are rounded to the weight's type and then
computed with in fp32, as a model does that calls `logits.float()`; on a GPU by kernels that pass over a chunk once and
need no copy of it in fp32 (`passes`). The idea of never holding the logits is Cut Cross-Entropy's (arXiv:2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

CHUNK = 16 << 20  # bytes of a chunk's logits, where that is at least LEAST rows
LEAST = 256  # rows (or words): with fewer, products wait for memory
STREAMING = 4  # chunks from which on a step streams; with more of them chunks are smaller here, with fewer larger
FEWEST = 16  # where a smaller chunk was asked for
CACHED = 1 << 20  # bytes of logits that a processor's cache holds
BLOCK = 512  # rows of the hidden state's gradient that are added to at once
LINE = 16  # bytes a GPU's thread moves at once, from a multiple of them on
SMALL = 64  # bytes a row that stands for what is of rows alone: targets, sums, losses
Gradients = tuple[Tensor, Tensor, Tensor]  # of hidden, weight, bias; empty where not wanted
Slopes = Callable[[slice], Tensor]  # of a chunk's rows or words, the gradient of its logits in fp32 at least


def chunk_size(count: int, across: int, chunk: int) -> int:
    """How many of `count` rows (or words) a chunk of so many bytes takes whose other side is `across` long, in fp32:
    all chunks about the same."""
    least = LEAST if chunk >= CHUNK else max(FEWEST, LEAST * chunk // CHUNK)
    most = min(count, max(least, chunk // (4 * across)))
    return -(-count // max(-(-count // max(most, 1)), 1))


def chunk_bytes(chunks: int) -> int:
    """Bytes of a chunk's logits in a step that streams in so many chunks: the budget is then what counts.

    With 1, 2 or 3 nothing streams, and there is room: the weight's gradient is read and written once a chunk, which
    products of 256 rows do not hide (twice the bytes for each one less). 0: neither.
    """
    if 0 < chunks < STREAMING:
        return CHUNK << (STREAMING + 1 - chunks)
    return CHUNK * STREAMING // max(chunks, STREAMING)


def at_once(logits: Tensor) -> Iterator[slice]:
    """Rows of a chunk that are worked on together: on a processor what its cache holds."""
    row = logits.shape[1] * logits.element_size()
    return chunks_of(len(logits), len(logits) if logits.is_cuda else max(CACHED // max(row, 1), 1))


def workspace_bytes(rows: int, words: int, width: int, itemsize: int, chunk: int, copies: int = 0) -> int:
    """At most what is taken for a chunk of logits, and of rows; below fp32 the chunk in both types, and of the hidden
    state's gradient what rounding takes off, and a block of rows in both types. copies: more of the chunk, in fp32,
    while it is not in both."""
    if itemsize >= 4:
        return itemsize * (1 + copies) * chunk_size(rows, words, chunk) * words + SMALL * rows
    both = max(4 + itemsize, 4 + 4 * copies) * rows * chunk_size(words, rows, chunk)
    return both + width * (itemsize * rows + (4 + itemsize) * min(rows, BLOCK)) + SMALL * rows


def is_whole(dtype: torch.dtype) -> bool:
    """Whether chunks are of rows: the type sums as it computes."""
    return dtype in (torch.float32, torch.float64)


def chunks_of(count: int, size: int) -> Iterator[slice]:
    """So many at a time."""
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def row_chunks(hidden: Tensor, weight: Tensor, chunk: int) -> Iterator[slice]:
    """Rows of a chunk of so many bytes."""
    return chunks_of(len(hidden), chunk_size(len(hidden), len(weight), chunk))


def word_chunks(hidden: Tensor, weight: Tensor, chunk: int) -> Iterator[slice]:
    """Words of a chunk of so many bytes."""
    return chunks_of(len(weight), chunk_size(len(weight), len(hidden), chunk))


def made(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in fp32 at least, rounded to the inputs' type first. A tensor of its own."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits if logits.dtype is torch.float64 else logits.to(torch.float32)


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in the inputs' type, for the kernels: a tensor of its own, (N, V), whose rows begin a multiple of LINE
    bytes apart. So products of any number of words read and write it by whole LINEs."""
    words, each = len(weight), LINE // weight.element_size()
    out = hidden.new_empty(len(hidden), -(-words // each) * each)[:, :words]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def passes(x: Tensor) -> Any:
    """The kernels that pass over a chunk once (memopt/kernels/gpu/logits.py), where the tensor is on a GPU and its type
    is one of theirs; else None."""
    if not x.is_cuda or x.dtype is torch.float64 or find_spec("triton") is None:
        return None
    return import_module("memopt.kernels.gpu.logits")


def part(numbers: Tensor | None, of: slice) -> Tensor | None:
    """The bias of these words, or what is of these rows; None where there is none."""
    return None if numbers is None else numbers[of]


def inside(places: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in these words, and where there; 0 for the others."""
    within = (places >= words.start) & (places < words.stop)
    return within, torch.where(within, places - words.start, 0)


def check_targets(targets: Tensor, valid: Tensor, words: int) -> None:
    """Raise RuntimeError (on a GPU: its assertion) where a target that counts is none of the words."""
    known = (targets >= 0) & (targets < words)
    torch._assert_async((known | ~valid).all(), f"a target is out of bounds: words are 0 to {words - 1}")


def empty(hidden: Tensor, weight: Tensor, wanted: list[bool]) -> Gradients:
    """Room for the gradients."""
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    makers = hidden, weight, weight
    room = [m.new_empty(shape if yes else (0,)) for m, shape, yes in zip(makers, shapes, wanted, strict=True)]
    return room[0], room[1], room[2]


def by_rows(hidden: Tensor, weight: Tensor, wanted: list[bool], chunk: int, slopes: Slopes) -> Gradients:
    """Gradients of hidden, weight and bias by those of the logits of each chunk of rows."""
    by_hidden, by_weight, by_bias = empty(hidden, weight, wanted)
    by_weight.zero_(), by_bias.zero_()
    for rows in row_chunks(hidden, weight, chunk):
        slope = slopes(rows)
        if wanted[0]:
            torch.mm(slope, weight, out=by_hidden[rows])
        if wanted[1]:
            by_weight.addmm_(slope.t(), hidden[rows])
        if wanted[2]:
            by_bias += slope.sum(0)
        del slope  # before the next are made
    return by_hidden, by_weight, by_bias


def by_words(hidden: Tensor, weight: Tensor, wanted: list[bool], chunk: int, slopes: Slopes) -> Gradients:
    """Gradients of hidden, weight and bias by those of the logits of each chunk of words."""
    by_hidden, by_weight, by_bias = empty(hidden, weight, wanted)
    rest = torch.zeros_like(by_hidden)  # what rounding takes off the sum so far
    by_hidden.zero_()
    for words in word_chunks(hidden, weight, chunk) if any(wanted) else ():
        slope = slopes(words)
        rounded = slope.to(hidden.dtype)
        if wanted[2]:
            by_bias[words] = slope.sum(0)
        del slope
        if wanted[1]:
            torch.mm(rounded.t(), hidden, out=by_weight[words])
        if wanted[0]:
            _add(by_hidden, rest, rounded, weight[words])
        del rounded
    return by_hidden, by_weight, by_bias


def _add(total: Tensor, rest: Tensor, slopes: Tensor, weight: Tensor) -> None:
    """total + rest += slopes weight, in twice the digits of their type, some rows at a time."""
    for rows in chunks_of(len(total), BLOCK):
        new = (slopes[rows] @ weight).to(torch.float32)
        new.add_(total[rows]).add_(rest[rows])
        total[rows] = new
        rest[rows] = new.sub_(total[rows])


def joined(lse: Tensor, logits: Tensor) -> Tensor:
    """Log of each row's sum of exponentials, so far and of these logits, which are lost. (N,)"""
    top = logits.amax(1)
    top = torch.where(top == -torch.inf, 0, top)  # words that are all hidden add nothing
    return torch.logaddexp(lse, logits.sub_(top[:, None]).exp_().sum(1).log_() + top)
