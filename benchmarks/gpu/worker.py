"""One row of the GPU benchmark: build the model where it runs, train a few steps with AdamW, measure. Prints JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.rows import Job
from benchmarks.peers import SMALLEST, Loss, Variant, set_up
from memopt.models import load
from memopt.runtime.measure import measure, training_step
from memopt.runtime.resident import resident_tensors
from memopt.units import resolve_budget
from memopt.workbench import bench

WARM_UP = 2


def variant_of(job: Job, capacity: int) -> Variant:
    """The row as benchmarks/peers.py knows it."""
    budget = 0
    if job.budget:
        asked = int(job.budget) if job.budget.isdecimal() else job.budget
        budget = SMALLEST if job.budget == "smallest" else resolve_budget(asked, capacity=capacity)
    return Variant(
        job.name, job.checkpoint, job.compiled, job.share, budget=budget, peer=job.peer, lowering=job.lowering
    )


def row_of(job: Job) -> dict[str, Any]:
    """Bytes, seconds and loss of the step, and for memopt what it promised."""
    made = bench(load(job.model), job.batch, job.seq, job.dtype, "adamw", None)
    torch.manual_seed(0)
    model, inputs = made.build(job.device)
    model.model.config.use_cache = False  # type: ignore[union-attr]  # training keeps no keys and values
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loss, promised = set_up(variant_of(job, made.target.memory), model, inputs, optimizer)
    step = training_step(loss, optimizer)
    held = resident_tensors(model, inputs)
    found = measure(step, resident=held, warmup=WARM_UP, repeats=job.steps, device=job.device)
    row = {
        "peak": found.peak_bytes,
        "reserved": found.reserved_bytes,
        "phases": dict(found.phases),
        "seconds": found.seconds,
        "loss": float(loss()),
    }
    return row | (_kept(job, promised, found.peak_bytes, model, loss, optimizer) if promised else {})


def _kept(job: Job, promised: dict[str, Any], peak: int, model: Any, loss: Loss, optimizer: Any) -> dict[str, Any]:
    """Whether the budget was held, by allocated bytes, and on CUDA also with no more than it to reserve."""
    latest = model.memopt.plan.plan.peak  # the lowering may have planned again
    told = promised | {"planned": latest, "held": peak <= promised["budget"], "prediction_error": peak / latest - 1}
    if job.device == "cuda":
        told["held_reserved"] = _fits_reserved(promised["budget"], loss, optimizer)
    return told


def _fits_reserved(budget: int, loss: Loss, optimizer: Any) -> bool:
    """Two more steps in a process that may reserve no more than the budget."""
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / torch.cuda.get_device_properties(0).total_memory))
    step = training_step(loss, optimizer)
    try:
        step()
        step()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def main() -> None:
    """Run the job in the only argument; the row is the last line on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever others print must not end up beside the row
    row = row_of(Job(**json.loads(sys.argv[1])))
    out.write(json.dumps(row, default=_plain) + "\n")
    out.flush()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else str(value)


if __name__ == "__main__":
    main()
