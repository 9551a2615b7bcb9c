"""One variant in a process of its own: compile and measure it, then take a step whenever the parent asks for one.

Started by benchmarks/cpu/race.py. Speaks JSON lines: first the row, then one answer for each line read.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.beds import BEDS, Inputs, LossOnly
from benchmarks.gradients import difference
from benchmarks.peers import Loss, Variant, set_up
from memopt.runtime.measure import measure
from memopt.runtime.phases import phase
from memopt.runtime.resident import distinct_bytes, resident_tensors


@dataclass(frozen=True)
class Job:
    """What a worker is told. gradients: where eager's are: written by eager's worker, compared by the others."""

    bed: str
    variant: Variant
    gradients: str
    threads: int = 2

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        given = json.loads(text)
        return Job(**{**given, "variant": Variant(**given["variant"])})


def step_of(loss: Loss, model: LossOnly) -> Callable[[], None]:
    """Forward and backward; gradients are let go at its end, so that each step begins from the same bytes."""

    def step() -> None:
        with phase("forward"):
            value = loss()
        with phase("backward"):
            value.backward()
        model.zero_grad(set_to_none=True)

    return step


def row_of(job: Job, model: LossOnly, inputs: Inputs) -> tuple[Callable[[], None], dict[str, Any]]:
    """The step, compiled and run, and what was measured of it: bytes and seconds."""
    started = time.perf_counter()
    loss, told = set_up(job.variant, model, inputs)
    step = step_of(loss, model)
    difference = _difference(loss, model, Path(job.gradients), job.variant.name == "eager")
    compile_seconds = time.perf_counter() - started
    resident = distinct_bytes(resident_tensors(model, inputs))
    found = measure(step, resident=resident_tensors(model, inputs), warmup=1, repeats=0)
    row = {
        "peak": found.peak_bytes,
        "resident": resident,
        "transient": found.peak_bytes - resident,
        "phases": dict(found.phases),
        "compile_seconds": compile_seconds,
        "gradient_difference": difference,
    }
    return step, row | told


def _difference(loss: Loss, model: LossOnly, path: Path, write: bool) -> float:
    """Of the gradients from those eager left at the path."""
    loss().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if write:
        torch.save(found, path)
    wanted: dict[str, torch.Tensor] = torch.load(path, mmap=True)
    if wanted.keys() != found.keys():
        raise RuntimeError("not the parameters that get a gradient in eager")
    worst = difference([found[name] for name in wanted], list(wanted.values()))
    model.zero_grad(set_to_none=True)
    return worst


def _answer_requests(step: Callable[[], None], say: Callable[[dict[str, Any]], None]) -> None:
    """A line "step" runs one and answers its seconds, wall and CPU; the end of input ends the worker."""
    for line in sys.stdin:
        if line.strip() != "step":
            return
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        say({"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
        _give_back()


def _give_back() -> None:
    """Free heap goes back to the system: many workers wait at the same time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    """Run the job in the only argument."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever others print must not end up among the answers

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")

    job = Job.from_json(sys.argv[1])
    torch.set_num_threads(job.threads)
    model, inputs = BEDS[job.bed].make()
    step, row = row_of(job, model, inputs)
    _give_back()
    say(row)
    _answer_requests(step, say)


if __name__ == "__main__":
    main()
