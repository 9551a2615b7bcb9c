"""One row of the GPU benchmark: build the model where it runs, train a few steps, measure. Prints JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.beds import BEDS
from benchmarks.gpu.rows import Job
from benchmarks.gpu.setup import bench_of, built, offloaded, optimizer_of, variant_of
from benchmarks.peers import Loss, set_up
from benchmarks.record import surroundings
from memopt.errors import BudgetError
from memopt.runtime.measure import measure, training_step
from memopt.runtime.resident import resident_tensors

# Steps before the measured one. The first compiles and makes the optimizer's state. memopt's guard watches the second;
# what it finds may make the third plan and compile again, and so the fifth, and not more often (session.CORRECTIONS).
WARM_UP, SETTLE = 3, 6
LIMITS = (1.0, 1.02, 1.05, 1.1)  # of the budget: what memopt's step may reserve, tried in this order


def row_of(job: Job) -> dict[str, Any]:
    """What the step took, and for memopt what it promised; why there is nothing to measure, where it does not fit."""
    try:
        return measured(job)
    except BudgetError as refused:
        return {"floor": refused.floor_bytes}
    except Exception as error:
        if (why := out_of_memory(error)) is None:
            raise
        return {"did_not_fit": why}


def measured(job: Job) -> dict[str, Any]:
    """Bytes, seconds and first loss of the step. Raises BudgetError, and what a device that is full raises."""
    made = bench_of(BEDS[job.bed], job.device)
    model, inputs = built(made, job)
    optimizer = optimizer_of(made, job, model)
    loss, promised = set_up(variant_of(job, made.target.memory), model, inputs, optimizer)
    first: list[Tensor] = []
    step = training_step(noted(offloaded(loss) if job.offload else loss, first), optimizer)
    warm_up(step, SETTLE if promised else WARM_UP, job.device)
    held = resident_tensors(model, inputs, optimizer)
    found = measure(step, resident=held, warmup=0, repeats=0, device=job.device)
    times = [clocked(step, job.device) for _ in range(job.steps)]
    row = {
        "peak": found.peak_bytes,
        "reserved": found.reserved_bytes,
        "phases": dict(found.phases),
        "seconds": sorted(times)[len(times) // 2],
        "times": [round(seconds, 5) for seconds in times],
        "loss": float(first[0]),
    }
    return row | (kept(job, promised, found.peak_bytes, model, step, optimizer) if promised else {})


def noted(loss: Loss, first: list[Tensor]) -> Loss:
    """The forward, its first value put into the list: all rows begin from the same weights and data."""

    def run() -> Tensor:
        value = loss()
        if not first:
            first.append(value.detach().clone())
        return value

    return run


def warm_up(step: Callable[[], object], steps: int, device: str) -> None:
    """Take these steps. Before the last, what planning, compiling and tuning left cached is given back: the blocks
    reserved afterwards are those of training steps."""
    for turn in range(steps):
        if device == "cuda" and turn == steps - 1:
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
        step()


def clocked(step: Callable[[], object], device: str) -> float:
    """Seconds of one step, to the end of its last kernel."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def kept(
    job: Job, promised: dict[str, Any], peak: int, model: Any, step: Callable[[], object], optimizer: Any
) -> dict[str, Any]:
    """Whether the budget was held, by allocated bytes, and on CUDA in how much reserved memory the step still runs."""
    latest = model.memopt.plan.plan.peak  # real steps may have made it plan again
    asked = promised.pop("budget")  # bytes; the row's own "budget" is as it was asked for
    told = {**promised, "asked": asked, "planned": latest, "held": peak <= asked, "prediction_error": peak / latest - 1}
    if job.device == "cuda":
        told["limit"] = least_limit(asked, step, optimizer)
    return told


def least_limit(budget: int, step: Callable[[], object], optimizer: torch.optim.Optimizer) -> int | None:
    """The least of LIMITS, in bytes, in which two steps run when the process may reserve no more; None if in none."""
    total = torch.cuda.get_device_properties(0).total_memory
    for limit in (round(budget * share) for share in LIMITS):
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        if fits(step):
            return limit
    return None


def fits(step: Callable[[], object]) -> bool:
    """Whether two steps run. What else goes wrong is raised."""
    try:
        step()
        step()
        torch.cuda.synchronize()
    except Exception as error:
        if out_of_memory(error) is None:
            raise
        return False
    return True


def out_of_memory(error: BaseException) -> str | None:
    """The first sentences of the device's complaint that it is full, wherever in the chain; None if that is not it.

    cuBLAS and the CUDA runtime complain in their own words where torch's allocator had left them no room.
    """
    for each in chain(error):
        text = str(each)
        if isinstance(each, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in text or FULL in text:
            return ". ".join(text.split(". ")[:2])[:200]
    return None


FULL = "CUDA error: out of memory"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from; Dynamo keeps that in an attribute of its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__


def main() -> None:
    """Run the job in the only argument; the row is the last line on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever others print must not end up beside the row
    row = row_of(Job(**json.loads(sys.argv[1])))
    out.write(json.dumps({**row, "surroundings": surroundings()}, default=_plain) + "\n")
    out.flush()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else str(value)


if __name__ == "__main__":
    main()
