"""Saved tensors in the host's memory: `memopt::pack_host_0` copies one there, `memopt::unpack_host_0` back.

Every limit has a pool and a pair of operations. What stands for a value is a token beside it on its device, known by
its address, so that nobody waits to read it. Of a value on a GPU the copy goes to pinned memory and back on the stream
that computes: its seconds are seconds of the step, and nothing is read before it is there. torch's allocator of pinned
memory rounds a buffer up to a power of two, which is what counts here, and gives it out again only when the copies that
use it have ended (ATen/core/CachingHostAllocator.h).
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from memopt.edit import HOST
from memopt.errors import MemoptError
from memopt.kernels.codec import register
from memopt.runtime.tokens import TOKEN, token_bytes
from memopt.units import format_size

GIVEN_UP = "the step was given up, no parameter was changed"


class HostError(MemoptError):
    """A saved tensor did not fit into the host_budget, or is gone. The step is lost; parameters are as they were."""


def room(nbytes: int) -> int:
    """Bytes of the buffer for so many."""
    return 1 << max(nbytes - 1, 0).bit_length()


@dataclass
class Pool:
    """Buffers in host memory by the address of their token. limit: bytes they may take together.

    Threads may share it. A forked child may not: what its parent keeps is not there for it.
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

    def pack(self, x: Tensor) -> Tensor:
        """Copy flat values here; the token they are read back by. Raises HostError, and keeps nothing, without room."""
        if self.process != os.getpid():
            self.open()
        self.reserve(room(x.nbytes))
        try:
            buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            buffer.copy_(x, non_blocking=True)
            token = x.new_empty((TOKEN,), dtype=torch.uint8)
        except BaseException as error:
            with self.lock:
                self.held -= room(x.nbytes)
            if not isinstance(error, RuntimeError):
                raise
            raise HostError(f"{format_size(x.nbytes)} of host memory cannot be had: {error}; {GIVEN_UP}") from error
        self.buffers[token.data_ptr()] = buffer
        weakref.finalize(token, self.release, token.data_ptr(), self.process)
        return token

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
        buffer = self.buffers.get(token.data_ptr()) if self.process == os.getpid() else None
        if buffer is None or buffer.nbytes != out.nbytes:
            raise HostError(
                f"a saved activation of {out.nbytes} bytes is not in host memory any more: the tensor that stood for "
                "it was copied, or handed to another process, and the first one let go"
            )
        out.copy_(buffer, non_blocking=True)

    def release(self, address: int, process: int) -> None:
        """Its bytes are needed no more."""
        with self.lock:
            if process == os.getpid() == self.process:
                self.held -= room(self.buffers.pop(address).nbytes)


NUMBERS = count()  # of pools: an operation is registered once in a process
pools: dict[int, Pool] = {}


def use(limit: int) -> Pool:
    """The pool of this limit in bytes."""
    if limit not in pools:
        pool = pools[limit] = Pool(limit, f"{HOST}_{next(NUMBERS)}")
        register(pool.codec, pool.pack, pool.unpack, token_bytes)
    return pools[limit]
