"""Marks that say which phase of a step is running, so that each phase's peak can be told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar
from weakref import WeakSet

import torch
from torch.profiler import record_function

from memopt.runtime.trace import MARK


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark what runs inside as one phase ("forward", "backward", "optimizer", ...) of the step being measured.

    Costs a few microseconds when nothing is being measured. On CUDA phases must not nest.
    """
    cuda = _CUDA.get()
    with record_function(MARK + name):
        if cuda is None:
            yield
            return
        cuda.enter()
        try:
            yield
        finally:
            cuda.leave(name)


@dataclass(eq=False)
class CudaPeaks:
    """Peaks of the CUDA allocator, bytes, since `begin`. Its counters are one for all who watch: whoever resets them
    first tells everybody what they showed.

    part: the peak since the present phase began.
    """

    device: torch.device
    peak: int = 0
    reserved: int = 0
    part: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    watching: ClassVar[WeakSet[CudaPeaks]] = WeakSet()

    def begin(self) -> None:
        """Watch from here on."""
        self.lap()
        CudaPeaks.watching.add(self)

    def stop(self) -> None:
        """Watch no more."""
        self.lap()
        CudaPeaks.watching.discard(self)

    def lap(self) -> None:
        """Fold in the peaks since the last reset, for all who watch, and reset."""
        peak = torch.cuda.max_memory_allocated(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        for watcher in CudaPeaks.watching:
            watcher.peak, watcher.part = max(watcher.peak, peak), max(watcher.part, peak)
            watcher.reserved = max(watcher.reserved, reserved)
        torch.cuda.reset_peak_memory_stats(self.device)

    def enter(self) -> None:
        """A phase begins."""
        self.lap()
        self.part = 0

    def leave(self, name: str) -> None:
        """A phase ends."""
        self.lap()
        self.phases[name] = max(self.phases.get(name, 0), self.part)


@contextmanager
def cuda_peaks(device: torch.device, phases: bool = True) -> Iterator[CudaPeaks]:
    """Collect the peaks of what runs inside. phases: those marked by `phase` apart. Resets torch's peak counters."""
    peaks = CudaPeaks(device)
    token = _CUDA.set(peaks if phases else _CUDA.get())
    peaks.begin()
    try:
        yield peaks
    finally:
        _CUDA.reset(token)
        peaks.stop()


_CUDA: ContextVar[CudaPeaks | None] = ContextVar("memopt_cuda_peaks", default=None)
