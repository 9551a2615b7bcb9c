"""Marks that say which phase of a step is running, so that each phase's peak can be told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

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
        cuda.lap()
        try:
            yield
        finally:
            cuda.end(name)


@dataclass
class CudaPeaks:
    """Peaks of the CUDA allocator, bytes. Each phase resets its counters, so laps are folded in before that."""

    device: torch.device
    peak: int = 0
    reserved: int = 0
    phases: dict[str, int] = field(default_factory=dict)

    def lap(self) -> int:
        """Fold in the peaks since the last reset, reset, and return the allocated one."""
        peak = torch.cuda.max_memory_allocated(self.device)
        self.peak = max(self.peak, peak)
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def end(self, name: str) -> None:
        self.phases[name] = max(self.phases.get(name, 0), self.lap())


@contextmanager
def cuda_peaks(device: torch.device) -> Iterator[CudaPeaks]:
    """Collect the peaks of what runs inside, phases marked by `phase` apart. Resets torch's peak counters."""
    torch.cuda.reset_peak_memory_stats(device)
    peaks = CudaPeaks(device)
    token = _CUDA.set(peaks)
    try:
        yield peaks
    finally:
        _CUDA.reset(token)
        peaks.lap()


_CUDA: ContextVar[CudaPeaks | None] = ContextVar("memopt_cuda_peaks", default=None)
