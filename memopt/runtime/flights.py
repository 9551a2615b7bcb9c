"""Copies under way: the four operations of a pool whose copies go on while the step computes, for each part of a value.

    memopt::start_<codec>(Tensor x, int[] stride) -> Tensor                               a token; the copy out begins
    memopt::drain_<codec>(Tensor x, Tensor token, int[] stride) -> Tensor
                                     a token to read it back by, and behind it what stays, once x may be let go
    memopt::fetch_<codec>(Tensor token, int[] size, int[] stride, ScalarType dtype) -> Tensor    the copy in begins
    memopt::arrive_<codec>(Tensor(a!) x) -> ()                                                     x may be read

`drain` names x and `fetch` makes what it fills, so that whoever runs the step holds both for as long as a copy uses
them, and the timeline counts it. What a step that failed has let go is held here until its copy has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from memopt.edit import TOKEN
from memopt.kernels.codec import LIBRARY, flat
from memopt.tokens import WHOLE, moved, part_codec, staying_bytes


class Mover(Protocol):
    """A pool that copies while others compute. codec: of its operations. Flat tensors, as in `memopt.kernels.codec`."""

    codec: str

    def pack(self, x: Tensor) -> Tensor:
        """Copy and wait."""

    def start(self, x: Tensor) -> Tensor:
        """Begin to copy x, which nobody changes nor lets go until it is drained; a token."""

    def drain(self, x: Tensor, token: Tensor, beside: Tensor | None = None) -> Tensor:
        """Wait for that copy; the token that `fetch` takes, and behind it a copy of what stays."""

    def fetch(self, token: Tensor, out: Tensor) -> None:
        """Begin to fill `out`."""

    def arrive(self, out: Tensor) -> None:
        """Wait for that."""


def register_flights(pool: Mover) -> None:
    """Define the four operations of this pool, with their fakes, for the whole of a value and for each part."""
    for quarters in range(1, WHOLE + 1):
        _register(pool, quarters)


def _register(pool: Mover, quarters: int) -> None:
    codec = part_codec(pool.codec, quarters)

    def start(x: Tensor, stride: Sequence[int]) -> Tensor:
        row = flat(x, stride)
        part = row[: moved(row.numel(), quarters)]
        # Of a value laid out otherwise what is copied is a temporary, which nobody holds and the plan does not count.
        return pool.start(part) if row.data_ptr() == x.data_ptr() else pool.pack(part)

    def drain(x: Tensor, token: Tensor, stride: Sequence[int]) -> Tensor:
        return pool.drain(x, token, None if quarters == WHOLE else flat(x, stride)[moved(x.numel(), quarters) :])

    def fetch(token: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        out = torch.empty_strided(size, stride, dtype=dtype, device=token.device)
        row = out.as_strided((out.numel(),), (1,))
        first = moved(row.numel(), quarters)
        pool.fetch(token, row[:first])
        row[first:].view(torch.uint8).copy_(token[TOKEN:])
        return out

    def start_fake(x: Tensor, _: object) -> Tensor:
        return x.new_empty((TOKEN,), dtype=torch.uint8)

    def drain_fake(x: Tensor, _: object, __: object) -> Tensor:
        return x.new_empty((TOKEN + staying_bytes(x.numel(), x.itemsize, quarters),), dtype=torch.uint8)

    def fetch_fake(token: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=token.device)

    defined: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
        "start": ("(Tensor x, int[] stride) -> Tensor", start, start_fake),
        "drain": ("(Tensor x, Tensor token, int[] stride) -> Tensor", drain, drain_fake),
        "fetch": ("(Tensor token, int[] size, int[] stride, ScalarType dtype) -> Tensor", fetch, fetch_fake),
        "arrive": ("(Tensor(a!) x) -> ()", pool.arrive, lambda x: None),
    }
    for kind, (signature, run, fake) in defined.items():
        LIBRARY.define(f"{kind}_{codec}{signature}")
        LIBRARY.impl(f"{kind}_{codec}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"memopt::{kind}_{codec}", fake, lib=LIBRARY)
