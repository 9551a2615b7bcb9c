"""Saved tensors on disk: `memopt::pack_disk_0` writes one into an unnamed file, `memopt::unpack_disk_0` reads it back.

Every folder and limit has a pool, and every pool a pair of operations, so that models of one process do not mix. What a
step keeps in memory is a token of 16 bytes; when the token dies, its place in the file is free. The file has no name
(O_TMPFILE, or unlinked at once), so that a killed process leaves nothing behind. Writes and reads are awaited: the
seconds they take are seconds of the step. The system's page cache may hold what was written; torch does not.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from memopt.edit import DISK
from memopt.errors import MemoptError
from memopt.kernels.codec import register
from memopt.runtime.tokens import token_bytes
from memopt.units import format_size

TRIAL = 1 << 22  # bytes written and read back to learn a folder's rates
ALIGNED = 4096
GIVEN_UP = "the step was given up, no parameter was changed."


class DiskError(MemoptError):
    """A saved tensor could not be written or read. The step in progress is lost; parameters are as they were."""


@dataclass(frozen=True)
class DiskRates:
    """Bytes a second of writing and of reading back, and the seconds of the smallest write and read."""

    write: float
    read: float
    least: float


@dataclass
class Pool:
    """An unnamed file in a folder. limit: bytes it may hold. codec: of the operations that use it.

    slots: number -> (offset, bytes); free: bytes of a slot -> offsets to use again. Threads may share it. A forked
    child may not: it gets a file of its own, and what its parent wrote is not there for it.
    """

    folder: Path
    limit: int
    codec: str
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    free: dict[int, list[int]] = field(default_factory=dict)
    end: int = 0
    count: int = 0
    held: int = 0
    measured: DiskRates | None = None

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        """A file of this process's own, empty. Raises ValueError where the folder cannot be written to."""
        self.lock, self.process = threading.RLock(), os.getpid()
        self.slots, self.free, self.end, self.held = {}, {}, 0, 0
        try:
            self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # as long as the pool
        except OSError as error:
            raise ValueError(
                f"disk_path {str(self.folder)!r} cannot be written to: {error.strerror or error}"
            ) from error

    def write(self, data: memoryview) -> int:
        """Keep these bytes; the number of their slot. Raises DiskError, and keeps nothing, where there is no room."""
        with self.lock:
            if self.process != os.getpid():
                self.open()
            number, offset = self.reserved(len(data))
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self.file.fileno(), data[done:], offset + done)
        except BaseException as error:
            self.release(number, self.process)
            if not isinstance(error, OSError):
                raise
            raise DiskError(
                f"cannot write {format_size(len(data))} of saved activations to {self.folder}: "
                f"{error.strerror or error}; {GIVEN_UP} Free space there, or lower disk_budget"
            ) from error
        return number

    def reserved(self, size: int) -> tuple[int, int]:
        """Number and offset of a new slot. Raises DiskError beyond the limit."""
        if self.held + size > self.limit:
            raise DiskError(
                f"{format_size(self.held)} of saved activations lie in {self.folder}, {format_size(size)} more would "
                f"exceed the disk_budget of {format_size(self.limit)}; {GIVEN_UP} A forward holds its own until its "
                "backward has run"
            )
        room = aligned(size)
        reused = self.free.get(room)
        offset = reused.pop() if reused else self.end
        self.end = max(self.end, offset + room)
        self.count += 1
        self.held += size
        self.slots[self.count] = (offset, size)
        return self.count, offset

    def read(self, number: int, process: int, into: memoryview) -> None:
        """Fill the buffer with what this process wrote under that number. Raises DiskError."""
        offset, size = self.slots.get(number, (0, -1)) if process == os.getpid() else (0, -1)
        if size != len(into):
            raise DiskError(
                f"a saved activation of {len(into)} bytes is not on disk any more: the tensor that stood for it was "
                "copied, or handed to another process, and the first one let go"
            )
        done = 0
        try:
            while done < size and (got := os.preadv(self.file.fileno(), [into[done:]], offset + done)):
                done += got
        except OSError as error:
            raise DiskError(f"cannot read saved activations from {self.folder}: {error.strerror or error}") from error
        if done < size:
            raise DiskError(f"{self.folder} gave back {done} of {size} bytes of a saved activation: the file was cut")

    def release(self, number: int, process: int) -> None:
        """Its bytes are needed no more. A file that grew over its limit while sizes changed begins anew once empty."""
        with self.lock:
            if process != os.getpid() or process != self.process:
                return
            offset, size = self.slots.pop(number)
            self.held -= size
            self.free.setdefault(aligned(size), []).append(offset)
            if not self.slots and self.end > 2 * self.limit:
                self.file.truncate(0)
                self.free, self.end = {}, 0

    def rates(self) -> DiskRates:
        """What the folder does, measured once. Raises DiskError."""
        if self.measured is None:
            size = min(TRIAL, self.limit)
            small, large = (self.trial(each) for each in (min(ALIGNED, size), size))
            self.measured = DiskRates(size / large[0], size / large[1], max(small))
        return self.measured

    def trial(self, size: int) -> tuple[float, float]:
        """Seconds of the fastest of three writes and reads."""
        data = memoryview(bytearray(os.urandom(size)))
        best = [float("inf")] * 2
        for _ in range(3):
            begin = time.perf_counter()
            number = self.write(data)
            middle = time.perf_counter()
            self.read(number, self.process, data)
            best = [min(best[0], middle - begin), min(best[1], time.perf_counter() - middle)]
            self.release(number, self.process)
        return best[0], best[1]

    def pack(self, x: Tensor) -> Tensor:
        """Write flat values; the token they are read back by."""
        number = self.write(_bytes(x.cpu()))
        token = torch.tensor([number, self.process]).view(torch.uint8)
        weakref.finalize(token, self.release, number, self.process)
        return token

    def unpack(self, token: Tensor, out: Tensor) -> None:
        """Read the values a token stands for."""
        number, process = token.view(torch.int64).tolist()
        here = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype)
        self.read(number, process, _bytes(here))
        if here is not out:
            out.copy_(here)


NUMBERS = count()  # of pools: an operation is registered once in a process
pools: dict[tuple[Path, int], Pool] = {}


def use(folder: str | Path, limit: int) -> Pool:
    """The pool of this limit in bytes in this folder. Raises ValueError where that cannot be written to."""
    key = Path(folder).resolve(), limit
    if key not in pools:
        pool = pools[key] = Pool(*key, f"{DISK}_{next(NUMBERS)}")
        register(pool.codec, pool.pack, pool.unpack, token_bytes)
    return pools[key]


def pool_of(codec: str) -> Pool:
    """The pool that these operations use."""
    return next(pool for pool in pools.values() if pool.codec == codec)


def aligned(size: int) -> int:
    """Bytes of the slot for so many."""
    return -(-size // ALIGNED) * ALIGNED


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
