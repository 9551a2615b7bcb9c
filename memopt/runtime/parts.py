"""A part of a value elsewhere: its first quarters lie in a pool, the rest behind their token, in memory of its own.

Here the copies are awaited: `memopt::pack_<codec>` and `memopt::unpack_<codec>` (memopt/kernels/codec.py), one pair a
part. Copies under way: memopt/runtime/flights.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from memopt.edit import TOKEN
from memopt.kernels.codec import define, flat
from memopt.tokens import WHOLE, moved, part_codec, staying_bytes


class Keeper(Protocol):
    """A pool. codec: of whole values."""

    codec: str

    def pack(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """Copy flat values there; a token, and behind it what stays."""

    def unpack(self, token: Tensor, out: Tensor) -> None:
        """Copy back what the token stands for."""


def token_row(beside: Tensor | None, device: torch.device | str = "cpu") -> Tensor:
    """Room for a token, and behind it a copy of what stays."""
    row = torch.empty((TOKEN + (0 if beside is None else beside.nbytes),), dtype=torch.uint8, device=device)
    if beside is not None:
        row[TOKEN:].copy_(beside.view(torch.uint8))
    return row


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
        return TOKEN + staying_bytes(prod(shape), itemsize, quarters)

    return nbytes
