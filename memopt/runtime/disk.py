"""Saved tensors on disk: `memopt::pack_disk` writes one into an unnamed file, `memopt::unpack_disk` reads it back.

What a step keeps in memory is a token of 16 bytes; when the token dies, its place in the file is free. The file has no
name (O_TMPFILE, or unlinked at once), so that a killed process leaves nothing behind. Writes and reads are awaited:
the seconds they take are seconds of the step. The system's page cache may hold what was written; torch does not.
"""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from memopt.errors import MemoptError
from memopt.kernels.codec import register
from memopt.units import format_size

TOKEN = 16  # bytes: the number of a slot, and what it holds
TRIAL = 1 << 25  # bytes written and read back to learn a folder's rates
ALIGNED = 4096


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
    """An unnamed file in a folder. slots: number -> (offset, bytes); free: bytes of a slot -> offsets to use again."""

    folder: Path
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    free: dict[int, list[int]] = field(default_factory=dict)
    end: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        try:
            self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # as long as the pool
        except OSError as error:
            raise ValueError(
                f"disk_path {str(self.folder)!r} cannot be written to: {error.strerror or error}"
            ) from error

    def write(self, data: memoryview) -> int:
        """Keep these bytes; the number of their slot. Raises DiskError, and keeps nothing, where there is no room."""
        size = -(-len(data) // ALIGNED) * ALIGNED
        reused = self.free.get(size)
        offset = reused.pop() if reused else self.end
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self.file.fileno(), data[done:], offset + done)
        except OSError as error:
            self.free.setdefault(size, []).append(offset)
            asked = format_size(len(data))
            raise DiskError(
                f"cannot write {asked} of saved activations to {self.folder}: {error.strerror or error}; "
                "the step was given up, no parameter was changed. Free space there, or lower disk_budget"
            ) from error
        finally:
            self.end = max(self.end, offset + size)
        self.count += 1
        self.slots[self.count] = (offset, len(data))
        return self.count

    def read(self, number: int, into: memoryview) -> None:
        """Fill the buffer with what was written. Raises DiskError."""
        offset, size = self.slots.get(number, (0, -1))
        if size != len(into):
            raise DiskError(f"no saved activation {number} of {len(into)} bytes is on disk; this is a bug of memopt's")
        done = 0
        try:
            while done < size and (got := os.preadv(self.file.fileno(), [into[done:]], offset + done)):
                done += got
        except OSError as error:
            raise DiskError(f"cannot read saved activations from {self.folder}: {error.strerror or error}") from error
        if done < size:
            raise DiskError(f"{self.folder} gave back {done} of {size} bytes of a saved activation: the file was cut")

    def release(self, number: int) -> None:
        """Its bytes are needed no more."""
        offset, size = self.slots.pop(number)
        self.free.setdefault(-(-size // ALIGNED) * ALIGNED, []).append(offset)

    @property
    def held(self) -> int:
        """Bytes that slots hold now."""
        return sum(size for _, size in self.slots.values())


_pools: dict[Path, Pool] = {}
_rates: dict[Path, DiskRates] = {}
_current: list[Path] = []


def use(folder: str | Path | None) -> Pool:
    """The pool of this folder (None: the system's for temporary files), which saved tensors go to from now on.

    Raises ValueError for a folder that is missing or cannot be written to.
    """
    place = Path(folder) if folder is not None else Path(tempfile.gettempdir())
    if not place.is_dir():
        raise ValueError(f"disk_path {str(place)!r} is not a folder; name one that exists, on the disk to use")
    place = place.resolve()
    if place not in _pools:
        _pools[place] = Pool(place)
    _current[:] = [place]
    return _pools[place]


def rates() -> DiskRates:
    """What the folder in use does, measured once in this process."""
    pool = _pool()
    if pool.folder not in _rates:
        small, large = (_trial(pool, size) for size in (ALIGNED, TRIAL))
        _rates[pool.folder] = DiskRates(TRIAL / large[0], TRIAL / large[1], max(small))
    return _rates[pool.folder]


def _trial(pool: Pool, size: int) -> tuple[float, float]:
    """Seconds of the fastest of three writes and reads."""
    data = memoryview(bytearray(os.urandom(size)))
    best = [float("inf")] * 2
    for _ in range(3):
        begin = time.perf_counter()
        number = pool.write(data)
        middle = time.perf_counter()
        pool.read(number, data)
        best = [min(best[0], middle - begin), min(best[1], time.perf_counter() - middle)]
        pool.release(number)
    return best[0], best[1]


def _pool() -> Pool:
    return _pools[_current[0]] if _current else use(None)


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


def pack(x: Tensor) -> Tensor:
    """Write flat values; the token they are read back by: the number of their slot, and of its pool."""
    pool = _pool()
    number = pool.write(_bytes(x.cpu()))
    token = torch.tensor([number, [*_pools].index(pool.folder)]).view(torch.uint8)
    weakref.finalize(token, pool.release, number)
    return token


def unpack(token: Tensor, out: Tensor) -> None:
    """Read the values a token stands for."""
    number, place = token.view(torch.int64).tolist()
    pool = [*_pools.values()][place]
    if out.device.type == "cpu":
        pool.read(number, _bytes(out))
        return
    here = torch.empty(out.shape, dtype=out.dtype)
    pool.read(number, _bytes(here))
    out.copy_(here)


register("disk", pack, unpack, lambda count: TOKEN)
