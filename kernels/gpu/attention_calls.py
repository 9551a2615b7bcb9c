"""A call of chunked attention as its kernels on a GPU take it, and the tiles they take it in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from memopt.kernels.gpu.attention_tiles import ADDED, FILLS, REPLACES

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST, NARROWEST = 128, 16  # elements of a head: what registers hold, what tensor cores take
TERMS = 3
# (queries, keys, warps, stages) of a tile, by bytes an element and width: the largest that 128 registers a thread hold.
# fp32 has one for all but keys of crowded calls, so that scores made again have the same bits.
TILES: dict[str, dict[tuple[int, int], tuple[int, int, int, int]]] = {
    "forward": {(2, 64): (128, 32, 8, 2), (2, 128): (64, 32, 8, 2), (4, 64): (32, 32, 8, 2), (4, 128): (32, 32, 8, 2)},
    "statistics": {
        **{(2, 64): (128, 32, 8, 2), (2, 128): (128, 32, 8, 2)},
        **{(4, 64): (32, 32, 8, 2), (4, 128): (32, 32, 8, 2)},
    },
    "queries": {(2, 64): (128, 32, 8, 2), (2, 128): (32, 64, 8, 2), (4, 64): (32, 32, 8, 2), (4, 128): (32, 32, 8, 2)},
    "keys": {(2, 64): (32, 32, 4, 2), (2, 128): (16, 64, 8, 1), (4, 64): (32, 32, 16, 1), (4, 128): (32, 32, 8, 1)},
}
# Of calls that are `crowded`: with the tiles above, up to 808 bytes a thread would be on the stack.
CROWDED: dict[str, dict[tuple[int, int], tuple[int, int, int, int]]] = {
    "forward": {(2, 64): (32, 32, 8, 2), (2, 128): (32, 32, 8, 2)},
    "statistics": {(2, 64): (64, 32, 8, 2), (2, 128): (64, 16, 8, 2)},
    "queries": {(2, 64): (32, 32, 8, 2), (2, 128): (32, 32, 8, 2)},
    "keys": {(2, 64): (32, 32, 8, 2), (2, 128): (16, 32, 8, 1), (4, 128): (16, 32, 8, 1)},
}
LAUNCH = {"maxnreg": 128, "enable_fp_fusion": True}  # more registers, and half of a processor's threads would be idle


def takes(q: Tensor, v: Tensor, terms: Sequence[Tensor], seed: Tensor | None) -> bool:
    """Whether the kernels take it: no dropout, whose draws are made a chunk at a time, no fp64, heads of at most
    `WIDEST` elements and at most `TERMS` terms. Known without waiting for the device."""
    numbers = q.dtype in TYPES and v.dtype in TYPES and all(term.dtype in (torch.bool, *TYPES) for term in terms)
    some = min(q.numel(), v.numel()) > 0 and max(q.shape[3], v.shape[3]) <= WIDEST
    return numbers and some and len(terms) <= TERMS and seed is None


class Call:
    """Arguments that every kernel has, of q (B, H, Q, E), k (B, G, K, E), v (B, G, K, D) and what is done to scores."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, terms: Sequence[Tensor], fills: Sequence[float],
        by_distance: Sequence[bool], added: Sequence[bool], left: int | None, right: int | None, hidden: float,
        hidden_added: bool, scale: float, cap: float,
    ) -> None:  # fmt: skip
        self.samples, self.heads, self.queries, self.width = q.shape
        self.groups, self.keys, self.value = k.shape[1], k.shape[2], v.shape[3]
        self.item = max(q.element_size(), v.element_size())
        self.blind = bool(terms) and hidden != -math.inf and (left, right) != (None, None)
        size = (self.samples, self.heads, self.queries, self.keys)
        squares = [square(term, far, size) for term, far in zip(terms, by_distance, strict=True)]
        kinds = tuple(kind(term, replaced) for term, replaced in zip(terms, added, strict=True))
        self.crowded = crowded(kinds, [steps[2] is not None for _, steps in squares], bool(cap), self.item)
        self.same = {
            "terms": tuple((*each, float(fill)) for each, fill in zip(squares, fills, strict=True)),
            "window": (left, right),
            "numbers": (hidden if self.blind else -math.inf, scale, cap),
            "sizes": (self.heads, self.heads // self.groups, self.queries, self.keys),
            "FORM": (kinds, bool(cap), self.blind, self.blind and not hidden_added),
        }

    def given(self, name: str) -> dict[str, Any]:
        """All that the kernel of this name is given besides its tensors and their steps."""
        return {**self.same, **constants(name, self.width, self.value, self.item, self.crowded)}

    def programs(self, name: str) -> tuple[int]:
        """One for each tile of queries of each head, or of keys of each group."""
        m, n, *_ = tile(name, self.width, self.value, self.item, self.crowded)
        if name == "keys":
            return (self.samples * self.groups * triton.cdiv(self.keys, n),)
        return (self.samples * self.heads * triton.cdiv(self.queries, m),)


def crowded(kinds: Sequence[int], by_query: Sequence[bool], capped: bool, item: int) -> bool:
    """Whether registers hold less of a tile: with terms, but for one mask of keys and no cap; in fp32 without any."""
    if not kinds:
        return item == torch.float32.itemsize
    return capped or len(kinds) > 1 or kinds[0] == ADDED or by_query[0]


def tile(name: str, width: int, value: int, item: int, less: bool) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages); less: of a `crowded` call."""
    at = item, 64 if max(width, value) <= 64 else WIDEST
    return CROWDED[name].get(at, TILES[name][at]) if less else TILES[name][at]


def constants(name: str, width: int, value: int, item: int, less: bool) -> dict[str, Any]:
    """Of a kernel, for heads so wide."""
    m, n, warps, stages = tile(name, width, value, item, less)
    padded = {at: max(NARROWEST, triton.next_power_of_2(each)) for at, each in (("E", width), ("D", value))}
    launched = {"num_warps": warps, "num_stages": stages, **LAUNCH}
    return {"WIDTH": width, "VALUE": value, **padded, "M": m, "N": n, **launched}


def kind(term: Tensor, replaced: bool) -> int:
    """Which of the kinds of attention_tiles.py."""
    if term.dtype is not torch.bool:
        return ADDED
    return REPLACES if replaced else FILLS


def square(
    term: Tensor, by_distance: bool, size: tuple[int, int, int, int]
) -> tuple[Tensor, tuple[int, int, int | None, int | None]]:
    """(from where on, steps over samples, heads, queries and keys) of a term, in elements."""
    if by_distance:
        samples, heads, _, one = term.expand(*size[:2], 1, -1).stride()
        return term[..., size[2] - 1 :], (samples, heads, -one, one)
    samples, heads, *steps = term.expand(size).stride()
    rows, columns = (None if n == 1 else step for n, step in zip(term.shape[2:], steps, strict=True))
    return term, (samples, heads, rows, columns)
