"""Saved tensors in the host's memory: `memopt::pack_host_0` copies one there, `memopt::unpack_host_0` back.

Every limit has a pool and a pair of operations. Of a value on a GPU the copy goes to pinned memory, on the stream that
computes: the seconds it takes are seconds of the step, and nothing is read before it is there. torch's allocator of
pinned memory gives a buffer out again only when the copies that use it have ended (CachingHostAllocator).
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from memopt.errors import MemoptError
from memopt.kernels.codec import register
from memopt.runtime.tokens import read_token, token, token_bytes
from memopt.units import format_size


class HostError(MemoptError):
    """A saved tensor did not fit into the host_budget, or is gone. The step is lost; parameters are as they were."""


@dataclass
class Pool:
    """Buffers in host memory by number. limit: bytes they may take together. Threads may share it."""

    limit: int
    codec: str
    buffers: dict[int, Tensor] = field(default_factory=dict)
    count: int = 0
    held: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def pack(self, x: Tensor) -> Tensor:
        """Copy flat values here; the token they are read back by. Raises HostError beyond the limit."""
        with self.lock:
            if self.held + x.nbytes > self.limit:
                raise HostError(
                    f"{format_size(self.held)} of saved activations lie in host memory, {format_size(x.nbytes)} more "
                    f"would exceed the host_budget of {format_size(self.limit)}; the step was given up, no parameter "
                    "was changed. A forward holds its own until its backward has run"
                )
            buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            self.count += 1
            self.held += x.nbytes
            self.buffers[self.count] = buffer
            number = self.count
        buffer.copy_(x, non_blocking=True)
        return token(number, self.release)

    def unpack(self, packed: Tensor, out: Tensor) -> None:
        """Copy the values that a token stands for. Raises HostError where they are gone."""
        number, process = read_token(packed)
        buffer = self.buffers.get(number) if process == os.getpid() else None
        if buffer is None or buffer.nbytes != out.nbytes:
            raise HostError(
                f"a saved activation of {out.nbytes} bytes is not in host memory any more: the tensor that stood for "
                "it was copied, or handed to another process, and the first one let go"
            )
        out.copy_(buffer, non_blocking=True)

    def release(self, number: int, process: int) -> None:
        """Its bytes are needed no more."""
        with self.lock:
            if process == os.getpid():
                self.held -= self.buffers.pop(number).nbytes


NUMBERS = count()  # of pools: an operation is registered once in a process
pools: dict[int, Pool] = {}


def use(limit: int) -> Pool:
    """The pool of this limit in bytes."""
    if limit not in pools:
        pool = pools[limit] = Pool(limit, f"host_{next(NUMBERS)}")
        register(pool.codec, pool.pack, pool.unpack, token_bytes)
    return pools[limit]
