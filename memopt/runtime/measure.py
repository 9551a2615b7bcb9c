"""What a step really took: peak bytes seen from outside, seconds, and the peak of each phase.

On CPU the peak is that of torch's allocator, from the profiler's memory events (memopt/runtime/trace.py), on top of
the storages that were there before. On CUDA it is `torch.cuda.max_memory_allocated` and `max_memory_reserved`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from memopt.plans import MeasuredStep
from memopt.runtime.phases import cuda_peaks, phase
from memopt.runtime.resident import distinct_bytes, refuse_freed, resident_tensors, watch
from memopt.runtime.trace import Trace, record

STEP = "step"


def measure(
    step: Callable[[], object],
    *,
    resident: Iterable[Tensor] = (),
    warmup: int = 1,
    repeats: int = 1,
    device: str | torch.device | None = None,
) -> MeasuredStep:
    """Run `step` warmup + 1 times under observation, then `repeats` times against the clock, and say what it took.

    resident: tensors alive before the call and throughout (parameters, buffers, inputs, optimizer state, gradients
    being accumulated); needed on CPU only, whose events do not tell what was there before. What the warm-up creates
    and keeps (optimizer state, gradients) is seen and need not be listed. repeats=0: seconds are those of the observed
    run, the profiler's overhead included. device: where the step runs; by default that of the resident tensors.

    Raises MemoptError if a profiler is already active, or a resident storage was freed meanwhile (its end is
    invisible on CPU, so the peak would be wrong).
    """
    tensors = tuple(resident)
    where = _device(tensors, device)
    if where.type == "cuda":
        observed = _observe_cuda(step, where, warmup)
        before = 0
    else:
        before = distinct_bytes(tensor for tensor in tensors if tensor.device.type == "cpu")
        watched = watch(tensors)
        del tensors, resident  # holding them here would keep alive what the step lets go of
        observed = _observe_cpu(step, warmup)
        refuse_freed(watched)
    seconds = [_timed(step, where) for _ in range(repeats)]
    return MeasuredStep(
        before + observed.peak,
        median(seconds) if seconds else observed.seconds,
        {name: before + peak for name, peak in observed.phases.items()},
        observed.reserved,
        profiled=not seconds and where.type != "cuda",
    )


def training_step(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None, accumulate: int = 1
) -> Callable[[], None]:
    """A step as training loops write it, with its phases marked: forward, backward, update, gradients let go.

    The loss lives until the update is done, as in a loop that logs it. accumulate: forwards and backwards an update.
    """

    def step() -> None:
        for _ in range(accumulate):
            with phase("forward"):
                value = loss()
            with phase("backward"):
                value.backward()
        if optimizer is not None:
            with phase("optimizer"):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def measure_step(
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    resident: Iterable[object] = (),
    accumulate: int = 1,
    warmup: int = 1,
    repeats: int = 1,
) -> MeasuredStep:
    """`measure` a training step: `loss()` is the forward. resident: modules, optimizers and containers of tensors.

    The optimizer's parameters and state are added to it. Gradients are let go before the first step and after each.
    Takes warmup + 1 + repeats real steps: the parameters change.
    """
    optimizer.zero_grad(set_to_none=True)
    step = training_step(loss, optimizer, accumulate)
    return measure(step, resident=resident_tensors(*resident, optimizer), warmup=warmup, repeats=repeats)


@dataclass(frozen=True, slots=True)
class _Observed:
    peak: int
    seconds: float
    phases: Mapping[str, int]
    reserved: int = 0


def _device(tensors: tuple[Tensor, ...], device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cpu"))


def _observe_cpu(step: Callable[[], object], warmup: int) -> _Observed:
    def run() -> None:
        for _ in range(warmup):
            step()
        gc.collect()  # of the step before, and of compiling: not this step's
        with phase(STEP):
            step()

    trace = record(run)
    (whole,) = trace.named(STEP)
    return _Observed(trace.peak(whole.start, whole.end), (whole.end - whole.start) / 1e9, _phases(trace))


def _phases(trace: Trace) -> dict[str, int]:
    (whole,) = trace.named(STEP)
    peaks: dict[str, int] = {}
    for found in trace.ranges:
        if found.name != STEP and found.start >= whole.start and found.end <= whole.end:
            peaks[found.name] = max(peaks.get(found.name, 0), trace.peak(found.start, found.end))
    return peaks


def _timed(step: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _observe_cuda(step: Callable[[], object], device: torch.device, warmup: int) -> _Observed:
    for _ in range(warmup):
        step()
    _synchronize(device)
    with cuda_peaks(device) as peaks:
        seconds = _timed(step, device)
    return _Observed(peaks.peak, seconds, peaks.phases, peaks.reserved)
