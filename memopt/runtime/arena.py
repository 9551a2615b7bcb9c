"""Tensors that lie in an unnamed file, read and written piece by piece: an optimizer's state between its updates.

Such a tensor is like any other (checkpoints read it), but its memory is the file's, mapped: torch holds none for it,
and the system takes its pages back as it likes. The room is taken when the tensor is made, so that no later write can
run out of it. The file has no name, so that a killed process leaves nothing behind; it ends with its last tensor.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from memopt.runtime.disk import DiskError, Flight, aligned, at
from memopt.units import format_size

Layout = tuple[Sequence[int], Sequence[int], torch.dtype]  # size, strides, type
Call = Callable[[int, list[memoryview], int], int]  # os.preadv or os.pwritev


@dataclass
class Arena:
    """An unnamed file of tensors in a folder."""

    folder: Path
    end: int = 0

    def __post_init__(self) -> None:
        self.process = os.getpid()
        self.out, self.back = (ThreadPoolExecutor(1, f"memopt state {way}") for way in ("out", "back"))
        self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # as long as its tensors
        weakref.finalize(self, self.file.close)

    def tensors(self, layouts: Sequence[Layout]) -> list[Tensor]:
        """Dense tensors of these layouts, their elements 0, in one mapping. Raises DiskError, and takes no room, where
        there is none for all of them."""
        sizes = [prod(size) * dtype.itemsize for size, _, dtype in layouts]
        offsets = [0, *accumulate(map(aligned, sizes))]
        if not offsets[-1]:
            return []
        try:
            os.posix_fallocate(self.file.fileno(), self.end, offsets[-1])
            mapped = mmap.mmap(self.file.fileno(), offsets[-1], offset=self.end)
        except OSError as error:
            os.ftruncate(self.file.fileno(), self.end)
            raise DiskError(
                f"cannot take {format_size(offsets[-1])} for gradients or the optimizer's state in {self.folder}: "
                f"{error.strerror or error}; no parameter was changed. Free space there, or lower disk_budget"
            ) from error
        made = []
        for (size, stride, dtype), nbytes, offset in zip(layouts, sizes, offsets, strict=False):
            flat = torch.frombuffer(mapped, dtype=dtype, count=prod(size), offset=offset)
            places[flat.data_ptr()] = Place(self, self.end + offset, nbytes)
            weakref.finalize(mapped, places.pop, flat.data_ptr())
            made.append(flat.as_strided(tuple(size), tuple(stride)))
        self.end += offsets[-1]
        return made


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file."""

    arena: Arena
    offset: int
    nbytes: int

    def read(self, start: int, into: Tensor) -> Flight:
        """Begin to fill a flat tensor on the CPU from byte `start`. Whoever waits for it gets the DiskError; a forked
        child, which has none of the threads, gets one here."""
        return self._flown(self.arena.back, os.preadv, start, into)

    def write(self, start: int, data: Tensor) -> Flight:
        """Begin to write a flat tensor on the CPU from byte `start`. Errors as of `read`."""
        return self._flown(self.arena.out, os.pwritev, start, data)

    def _flown(self, thread: ThreadPoolExecutor, call: Call, start: int, tensor: Tensor) -> Flight:
        if os.getpid() != self.arena.process:
            raise DiskError("the optimizer's state on disk is its process's own; a forked child cannot train with it")
        memory = at(tensor.data_ptr(), tensor.nbytes)  # the flight keeps the tensor, its thread must not
        return Flight(thread, tensor, partial(self._moved, call, start, memory))

    def _moved(self, call: Call, start: int, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                got = call(self.arena.file.fileno(), [view[done:]], self.offset + start + done)
                if not got:
                    raise DiskError(f"{self.arena.folder} ended amid the optimizer's state; {TORN}")
                done += got
        except OSError as error:
            raise DiskError(
                f"cannot reach the optimizer's state in {self.arena.folder}: {error.strerror or error}; {TORN}"
            ) from error


TORN = "some parameters may be updated and others not: load the last checkpoint"
places: dict[int, Place] = {}  # by the address of the storage


def place_of(tensor: Tensor) -> Place | None:
    """Where a tensor lies, if it is one of an arena's."""
    return places.get(tensor.untyped_storage().data_ptr()) if type(tensor) is Tensor else None
