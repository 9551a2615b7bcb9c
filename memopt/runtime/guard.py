"""Watches whether training steps stay within the planned peak, and says so once when one does not."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor

from memopt.plans import MeasuredStep
from memopt.runtime.phases import CudaPeaks
from memopt.runtime.resident import distinct_bytes
from memopt.runtime.trace import Recording, inside_backward, make_way, profiler_is_active

SHARE, SLACK = 0.01, 2**20  # what a prediction may be off by before the guard speaks: 1 % + 1 MiB


def tolerated(predicted: int) -> int:
    """The peak, in bytes, up to which a step counts as within its plan."""
    return predicted + int(predicted * SHARE) + SLACK


def thinned(step: int) -> bool:
    """Steps that bear being slowed, counted from 1: the second (the first makes optimizer state) and powers of two."""
    return step >= 2 and step & (step - 1) == 0


class Guard:
    """Compares steps with the plan. Call `begin_step` where each training forward begins: it ends the step before.

    predicted_peak: bytes. resident: called when an observation begins, gives the tensors alive then (CPU only, where
    the profiler does not tell). CUDA: every step but the first, which compiles, tunes kernels and makes the optimizer's
    state, by the allocator's own counters, which are reset at each step; seconds are those of the latest of the steps
    of `thinned`, as waiting for the device takes time. CPU: the steps of `thinned`, by the profiler, which slows them;
    not while the user's own profiler is active.
    """

    def __init__(
        self,
        predicted_peak: int,
        logger: logging.Logger | None = None,
        *,
        resident: Callable[[], Iterable[Tensor]] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.predicted_peak = predicted_peak
        self.logger = logger or logging.getLogger("memopt")
        self.resident = resident or (lambda: ())
        self.device = torch.device(device)
        self.measured: MeasuredStep | None = None  # the last step observed
        self.steps = 0  # begun so far
        self.warned = False
        self._began = 0.0
        self._seconds = 0.0  # of the latest step timed
        self._before = 0
        self._cuda = CudaPeaks(self.device)
        self._recording: Recording | None = None
        self._watching = False

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end_step()

    def begin_step(self) -> None:
        """A training step begins; the one before, if any, has ended. Nothing inside a backward begins or ends one."""
        if inside_backward():
            return
        self.end_step()
        self.steps += 1
        if self.device.type == "cuda":
            self._watching = self.steps > 1
            if self._watching:
                self._cuda = CudaPeaks(self.device)
                self._cuda.begin()
        elif thinned(self.steps) and (not profiler_is_active() or make_way()):
            self._before = distinct_bytes(tensor for tensor in self.resident() if tensor.device.type == "cpu")
            self._recording = Recording(yields=True)
            self._abandon = weakref.finalize(self, self._recording.abandon)
            self._watching = True
        self._began = self._clock()

    def end_step(self) -> None:
        """The step has ended: compare. Does nothing if none is being observed, or inside a backward."""
        if not self._watching or inside_backward():
            return
        self._watching = False
        if thinned(self.steps):
            self._seconds = self._clock() - self._began
        peak, reserved = self._peaks()
        if peak is not None:
            self.measured = MeasuredStep(peak, self._seconds, {}, reserved, profiled=self.device.type != "cuda")
            self._compare(peak)

    def _clock(self) -> float:
        """Now, seconds; on CUDA once everything launched has run, if the step is to be timed."""
        if self.device.type == "cuda" and thinned(self.steps):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _peaks(self) -> tuple[int | None, int]:
        """Peak bytes allocated (None: the recording was taken over by another profiler) and reserved."""
        if self.device.type == "cuda":
            self._cuda.stop()
            return self._cuda.peak, self._cuda.reserved
        assert self._recording is not None
        trace = self._recording.stop(contested=True)
        self._abandon.detach()  # it holds the recording, and that all events
        self._recording = None
        return (None if trace is None else self._before + trace.peak()), 0

    def _compare(self, peak: int) -> None:
        if self.warned or peak <= tolerated(self.predicted_peak):
            return
        self.warned = True
        over = peak - self.predicted_peak
        self.logger.warning(
            "memopt: step %d peaked at %.1f MiB, %.1f MiB (%.1f %%) over the %.1f MiB planned; said once, later steps "
            "are compared in silence",
            *(self.steps, peak / 2**20, over / 2**20, 100 * over / max(1, self.predicted_peak)),
            self.predicted_peak / 2**20,
        )
