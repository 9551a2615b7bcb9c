"""Copies under way: the four operations of a pool whose copies go on while the step computes.

    memopt::start_<codec>(Tensor x, int[] stride) -> Tensor                               a token; the copy out begins
    memopt::drain_<codec>(Tensor x, Tensor token) -> Tensor        a token to read it back by, once x may be let go
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

from memopt.kernels.codec import LIBRARY, flat
from memopt.tokens import TOKEN


class Mover(Protocol):
    """A pool that copies while others compute. codec: of its operations. Flat tensors, as in `memopt.kernels.codec`."""

    codec: str

    def pack(self, x: Tensor) -> Tensor:
        """Copy and wait."""

    def start(self, x: Tensor) -> Tensor:
        """Begin to copy x, which nobody changes nor lets go until it is drained; a token."""

    def drain(self, x: Tensor, token: Tensor) -> Tensor:
        """Wait for that copy; the token that `fetch` takes."""

    def fetch(self, token: Tensor, out: Tensor) -> None:
        """Begin to fill `out`."""

    def arrive(self, out: Tensor) -> None:
        """Wait for that."""


def register_flights(pool: Mover) -> None:
    """Define the four operations of this pool, with their fakes."""

    def start(x: Tensor, stride: Sequence[int]) -> Tensor:
        row = flat(x, stride)
        # Of a value laid out otherwise what is copied is a temporary, which nobody holds and the plan does not count.
        return pool.start(row) if row.data_ptr() == x.data_ptr() else pool.pack(row)

    def fetch(token: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        out = torch.empty_strided(size, stride, dtype=dtype, device=token.device)
        pool.fetch(token, out.as_strided((out.numel(),), (1,)))
        return out

    def token_fake(x: Tensor, _: object) -> Tensor:
        return x.new_empty((TOKEN,), dtype=torch.uint8)

    def fetch_fake(token: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=token.device)

    defined: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
        "start": ("(Tensor x, int[] stride) -> Tensor", start, token_fake),
        "drain": ("(Tensor x, Tensor token) -> Tensor", pool.drain, token_fake),
        "fetch": ("(Tensor token, int[] size, int[] stride, ScalarType dtype) -> Tensor", fetch, fetch_fake),
        "arrive": ("(Tensor(a!) x) -> ()", pool.arrive, lambda x: None),
    }
    for kind, (signature, run, fake) in defined.items():
        LIBRARY.define(f"{kind}_{pool.codec}{signature}")
        LIBRARY.impl(f"{kind}_{pool.codec}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"memopt::{kind}_{pool.codec}", fake, lib=LIBRARY)
