"""Saved tensors on disk: `memopt::pack_disk_0` writes one into an unnamed file, `memopt::unpack_disk_0` reads it back.

Every folder and limit has a pool, and every pool a pair of operations, so that models of one process do not mix. What a
step keeps in memory is a token of 16 bytes; when the token dies, its place in the file is free. The file has no name
(O_TMPFILE, or unlinked at once), so that a killed process leaves nothing behind. The system's page cache may hold what
was written; torch does not. `pack` and `unpack` are awaited. `start` and `fetch` (memopt/runtime/flights.py) leave the
copy to a thread, one each way, which writes from the value's own memory and reads into it: there are no buffers beside
what the plan counts. A place is free again once its token is dead and nobody writes or reads there any more.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from memopt.edit import DISK, TOKEN
from memopt.errors import MemoptError
from memopt.kernels.codec import register
from memopt.runtime.flights import register_flights
from memopt.runtime.parts import register_parts, token_row
from memopt.tokens import token_bytes
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


class Flight:
    """A copy that a thread does. kept: the tensor it uses, until somebody has waited for it or the step is given up.

    The thread itself lets go of nothing that a step may still let go of: of two who do, the later one frees the bytes,
    and a profiler sees only those that the step's own thread frees.
    """

    def __init__(self, thread: ThreadPoolExecutor, kept: Tensor, copy: Callable[[], None]) -> None:
        self.kept: Tensor | None = kept
        self.done: Future[None] = thread.submit(copy)

    def let_go(self, _: object = None) -> None:
        """Nobody uses the tensor any more."""
        self.kept = None

    def end(self) -> None:
        """Until the copy has ended, however."""
        wait([self.done])
        self.let_go()

    def wait(self) -> None:
        """Until the copy has ended. Raises DiskError as it did."""
        self.end()  # here and not in the thread: the tensor's bytes are free when the step says so
        self.done.result()


@dataclass
class Pool:
    """An unnamed file in a folder. limit: bytes it may hold. codec: of the operations that use it.

    slots: number -> (offset, bytes); free: bytes of a slot -> offsets to use again. flights: number -> copies from or
    to that slot; arriving: address -> the copy that fills the value there; owners: number -> what frees it. Threads may
    share it. A forked child may not: it gets a file of its own, and what its parent wrote is not there for it.
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
        self.flights: dict[int, list[Flight]] = {}
        self.arriving: dict[int, Flight] = {}
        self.owners: dict[int, weakref.finalize[..., Tensor]] = {}
        self.out, self.back = (ThreadPoolExecutor(1, f"memopt {self.codec}") for _ in range(2))
        try:
            self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # as long as the pool
        except OSError as error:
            raise ValueError(
                f"disk_path {str(self.folder)!r} cannot be written to: {error.strerror or error}"
            ) from error

    def write(self, data: memoryview) -> int:
        """Keep these bytes; the number of their slot. Raises DiskError, and keeps nothing, where there is no room."""
        number, offset = self.reserved(len(data))
        try:
            self.put(data, offset)
        except BaseException:  # whatever ended it, an interrupt too: nothing stays there
            self.release(number, self.process)
            raise
        return number

    def put(self, data: memoryview, offset: int) -> None:
        """Write these bytes there. Raises DiskError."""
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self.file.fileno(), data[done:], offset + done)
        except OSError as error:
            raise DiskError(
                f"cannot write {format_size(len(data))} of saved activations to {self.folder}: "
                f"{error.strerror or error}; {GIVEN_UP} Free space there, or lower disk_budget"
            ) from error

    def reserved(self, size: int) -> tuple[int, int]:
        """Number and offset of a new slot. Raises DiskError beyond the limit."""
        with self.lock:
            if self.process != os.getpid():
                self.open()
            if self.held + size > self.limit:
                raise DiskError(
                    f"{format_size(self.held)} of saved activations lie in {self.folder}, {format_size(size)} more "
                    f"would exceed the disk_budget of {format_size(self.limit)}; {GIVEN_UP} A forward holds its own "
                    "until its backward has run"
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
            self.owners.pop(number, None)
            under_way = [flight for flight in self.flights.get(number, ()) if not flight.done.done()]
            if under_way:  # a thread still writes or reads there: the place is not another's yet
                for flight in under_way:
                    if flight not in self.arriving.values():  # a write that nobody waits for: the step was given up
                        flight.done.add_done_callback(flight.let_go)
                under_way[-1].done.add_done_callback(lambda _: self.release(number, process))
                return
            self.flights.pop(number, None)
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

    def pack(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """Write flat values; the token they are read back by, and behind it a copy of what stays."""
        row = token_row(beside)
        return self.token(self.write(_bytes(x.cpu())), row)  # last: no slot is taken where there was no memory

    def token(self, number: int, made: Tensor) -> Tensor:
        """What stands for a slot, written into `made`. The slot's last token frees it by dying."""
        made[:TOKEN].numpy().view("int64")[:] = number, self.process
        with self.lock:
            if number in self.owners:
                self.owners[number].detach()
            self.owners[number] = weakref.finalize(made, self.release, number, self.process)
        return made

    def unpack(self, token: Tensor, out: Tensor) -> None:
        """Read the values a token stands for."""
        number, process = token[:TOKEN].view(torch.int64).tolist()
        here = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype)
        self.read(number, process, _bytes(here))
        if here is not out:
            out.copy_(here)

    def start(self, x: Tensor) -> Tensor:
        """Begin to write flat values; a token. Raises DiskError where there is no room."""
        data = _bytes(x)
        number, offset = self.reserved(len(data))
        address, size = x.data_ptr(), len(data)
        del data
        self.flights[number] = [Flight(self.out, x, lambda: self.put(at(address, size), offset))]
        return self.token(number, token_row(None))

    def drain(self, x: Tensor, token: Tensor, beside: Tensor | None = None) -> Tensor:
        """Wait until x is written; its token from now on, and behind it a copy of what stays. Raises DiskError if it
        could not be written."""
        number = token.view(torch.int64).tolist()[0]
        for flight in self.flights.pop(number, ()):
            flight.wait()
        return self.token(number, token_row(beside))

    def fetch(self, token: Tensor, out: Tensor) -> None:
        """Begin to read the values a token stands for."""
        number, process = token[:TOKEN].view(torch.int64).tolist()
        address, size = out.data_ptr(), out.nbytes
        with self.lock:
            for left in self.arriving.values():  # of a step that was given up, or about to be waited for
                if left.done.done():
                    left.let_go()
            flight = Flight(self.back, out, lambda: self.read(number, process, at(address, size)))
            self.flights.setdefault(number, []).append(flight)
            self.arriving[address] = flight

    def arrive(self, out: Tensor) -> None:
        """Wait until these values are read. Raises DiskError if they could not be."""
        self.arriving.pop(out.data_ptr()).wait()


NUMBERS = count()  # of pools: an operation is registered once in a process
pools: dict[tuple[Path, int], Pool] = {}


def use(folder: str | Path, limit: int) -> Pool:
    """The pool of this limit in bytes in this folder. Raises ValueError where that cannot be written to."""
    key = Path(folder).resolve(), limit
    if key not in pools:
        pool = pools[key] = Pool(*key, f"{DISK}_{next(NUMBERS)}")
        register(pool.codec, pool.pack, pool.unpack, token_bytes)
        register_parts(pool)
        register_flights(pool)
    return pools[key]


def pool_of(codec: str) -> Pool:
    """The pool of whole values that these operations use."""
    return next(pool for pool in pools.values() if pool.codec == codec)


def aligned(size: int) -> int:
    """Bytes of the slot for so many."""
    return -(-size // ALIGNED) * ALIGNED


def at(address: int, size: int) -> memoryview:
    """Bytes of memory that somebody else holds: a thread that held the tensor might let it go after the step does."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
