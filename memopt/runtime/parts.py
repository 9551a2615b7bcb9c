"""A part of a value elsewhere: its first quarters lie in a pool, the rest behind their token, in memory of its own.

The copies are awaited: `memopt::pack_<codec>` and `memopt::unpack_<codec>` (memopt/kernels/codec.py), one pair a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from memopt.kernels.codec import define, flat
from memopt.tokens import TOKEN, WHOLE, moved, part_codec


class Keeper(Protocol):
    """A pool. codec: of whole values."""

    codec: str

    def pack(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """Copy flat values there; a token, and behind it what stays."""

    def unpack(self, token: Tensor, out: Tensor) -> None:
        """Copy back what the token stands for."""


def register_parts(pool: Keeper) -> None:
    """Define the operations of each part, with their fakes."""
    for quarters in range(1, WHOLE):
        packed, unpacked = _pair(pool, quarters)
        define(part_codec(pool.codec, quarters), packed, unpacked, _bytes_of(quarters))


def _pair(pool: Keeper, quarters: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def packed(x: Tensor, stride: Sequence[int]) -> Tensor:
        row = flat(x, stride)
        first = moved(row.numel(), quarters)
        return pool.pack(row[:first], row[first:])

    def unpacked(packed: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        out = torch.empty_strided(size, stride, dtype=dtype, device=packed.device)
        row = out.as_strided((out.numel(),), (1,))
        first = moved(row.numel(), quarters)
        pool.unpack(packed, row[:first])
        row[first:].view(torch.uint8).copy_(packed[TOKEN:])
        return out

    return packed, unpacked


def _bytes_of(quarters: int) -> Callable[[Sequence[int], int], int]:
    def nbytes(shape: Sequence[int], itemsize: int) -> int:
        return TOKEN + (prod(shape) - moved(prod(shape), quarters)) * itemsize

    return nbytes
