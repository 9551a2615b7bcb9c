"""Saved tensors in the host's memory: `memopt::pack_host_0` copies one there, `memopt::unpack_host_0` back.

Every limit has a pool and its operations. What stands for a value is a token beside it on its device, known by its
address, so that nobody waits to read it. A value on a GPU goes to pinned memory and back: by `pack` and `unpack` on the
stream that computes, so that the seconds are the step's and nothing is read before it is there; by `start` and `fetch`
(memopt/runtime/flights.py) on streams beside it (memopt/runtime/links.py). torch's allocator of pinned memory rounds a
buffer up to a power of two, which is what counts here, and gives it out again only when the copies that use it have
ended (ATen/core/CachingHostAllocator.h).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

from memopt.edit import HOST
from memopt.errors import MemoptError
from memopt.kernels.codec import register
from memopt.runtime.flights import register_flights
from memopt.runtime.links import Flight, Link
from memopt.runtime.parts import register_parts, token_row
from memopt.tokens import token_bytes
from memopt.units import format_size

GIVEN_UP = "the step was given up, no parameter was changed"


T = TypeVar("T")


class HostError(MemoptError):
    """A saved tensor did not fit into the host_budget, or is gone. The step is lost; parameters are as they were."""


def room(nbytes: int) -> int:
    """Bytes of the buffer for so many."""
    return 1 << max(nbytes - 1, 0).bit_length()


@dataclass
class Pool:
    """Buffers in host memory by the address of their token. limit: bytes they may take together.

    leaving: token's address -> the copy out; arriving: value's address -> the copy in; given_up: copies out that nobody
    waits for any more. begun, awaited: how many copies in there have been, which a step that ends well leaves equal.
    owners: token's address -> what frees its buffer. Threads may share it. A forked child may not: what its parent
    keeps is not there for it.
    """

    limit: int
    codec: str
    buffers: dict[int, Tensor] = field(default_factory=dict)
    held: int = 0

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        """Empty, and this process's own."""
        self.lock, self.process, self.buffers, self.held = threading.RLock(), os.getpid(), {}, 0
        self.links: dict[tuple[torch.device, str], Link] = {}
        self.leaving: dict[int, Flight] = {}
        self.arriving: dict[int, Flight] = {}
        self.owners: dict[int, weakref.finalize[..., Tensor]] = {}
        self.given_up: list[Flight] = []
        self.begun = self.awaited = 0

    def pack(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """Copy flat values here; the token they are read back by, and behind it a copy of what stays. Raises HostError,
        and keeps nothing, without room."""
        return self.kept(x, lambda buffer: buffer.copy_(x, non_blocking=True), beside)[0]

    def kept(self, x: Tensor, copy: Callable[[Tensor], T], beside: Tensor | None = None) -> tuple[Tensor, T]:
        """A token for flat values, and what copying them into the buffer gave. Raises HostError, as `pack` does."""
        if self.process != os.getpid():
            self.open()
        self.reserve(room(x.nbytes))
        try:
            buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            made = copy(buffer)
            token = token_row(beside, x.device)
        except BaseException as error:
            with self.lock:
                self.held -= room(x.nbytes)
            if not isinstance(error, RuntimeError):
                raise
            raise HostError(f"{format_size(x.nbytes)} of host memory cannot be had: {error}; {GIVEN_UP}") from error
        self.own(token, buffer)
        return token, made

    def own(self, token: Tensor, buffer: Tensor) -> None:
        """The buffer is this token's, until it dies."""
        address = token.data_ptr()
        self.buffers[address] = buffer
        self.owners[address] = weakref.finalize(token, self.release, address, self.process)

    def start(self, x: Tensor) -> Tensor:
        """Begin to copy flat values here; a token. Raises HostError, as `pack` does."""
        self.settle()
        token, flight = self.kept(x, lambda buffer: self.link(x, "out").copy(buffer, x, x))
        self.leaving[token.data_ptr()] = flight
        return token

    def drain(self, x: Tensor, token: Tensor, beside: Tensor | None = None) -> Tensor:
        """Have the copy of x end before what is computed next; the token of its buffer from now on, and behind it a
        copy of what stays."""
        flight, made = self.leaving.pop(token.data_ptr(), None), token_row(beside, x.device)
        if flight is not None:  # none: it was awaited when it was packed
            flight.wait()
        if owner := self.owners.pop(token.data_ptr(), None):
            owner.detach()
            self.own(made, self.buffers.pop(token.data_ptr()))
        return made

    def fetch(self, token: Tensor, out: Tensor) -> None:
        """Begin to fill `out`. Raises HostError where the values are gone."""
        self.settle()
        self.arriving[out.data_ptr()] = self.link(out, "back").copy(out, self.buffer(token, out), out)
        self.begun += 1

    def arrive(self, out: Tensor) -> None:
        """Have these values be there before what is computed next. Raises HostError where nothing was to come."""
        flight = self.arriving.pop(out.data_ptr(), None)
        if flight is None:
            raise HostError(f"a saved activation of {out.nbytes} bytes was waited for, but never fetched; {GIVEN_UP}")
        flight.wait()
        self.awaited += 1

    def link(self, value: Tensor, way: str) -> Link:
        """The link this way of the device that holds the value."""
        if (value.device, way) not in self.links:
            self.links[value.device, way] = Link(value.device)
        return self.links[value.device, way]

    def settle(self) -> None:
        """Let go of what failed steps have left, once its copies have ended."""
        for flight in (*self.given_up, *self.arriving.values()):
            flight.settle()
        self.given_up = [flight for flight in self.given_up if flight.kept is not None]

    def reserve(self, nbytes: int) -> None:
        """Count so many bytes more. Raises HostError beyond the limit."""
        with self.lock:
            if self.held + nbytes > self.limit:
                raise HostError(
                    f"{format_size(self.held)} of saved activations lie in host memory, {format_size(nbytes)} more "
                    f"would exceed the host_budget of {format_size(self.limit)}; {GIVEN_UP}. A forward holds its own "
                    "until its backward has run"
                )
            self.held += nbytes

    def unpack(self, token: Tensor, out: Tensor) -> None:
        """Copy the values that a token stands for. Raises HostError where they are gone."""
        out.copy_(self.buffer(token, out), non_blocking=True)

    def buffer(self, token: Tensor, out: Tensor) -> Tensor:
        """The buffer that a token stands for, of as many bytes as `out`. Raises HostError where it is gone."""
        buffer = self.buffers.get(token.data_ptr()) if self.process == os.getpid() else None
        if buffer is None or buffer.nbytes != out.nbytes:
            raise HostError(
                f"a saved activation of {out.nbytes} bytes is not in host memory any more: the tensor that stood for "
                "it was copied, or handed to another process, and the first one let go"
            )
        return buffer

    def release(self, address: int, process: int) -> None:
        """Its bytes are needed no more."""
        with self.lock:
            if process == os.getpid() == self.process:
                self.owners.pop(address, None)
                if flight := self.leaving.pop(address, None):  # the step was given up
                    self.given_up.append(flight)
                self.held -= room(self.buffers.pop(address).nbytes)


NUMBERS = count()  # of pools: an operation is registered once in a process
pools: dict[int, Pool] = {}


def use(limit: int) -> Pool:
    """The pool of this limit in bytes."""
    if limit not in pools:
        pool = pools[limit] = Pool(limit, f"{HOST}_{next(NUMBERS)}")
        register(pool.codec, pool.pack, pool.unpack, token_bytes)
        register_parts(pool)
        register_flights(pool)
    return pools[limit]
