"""Workers side by side: each compiled in its own process, then stepped one at a time, round after round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cpu.worker import Job
from benchmarks.peers import PEERS, Variant, ours, smallest

ROOT = Path(__file__).resolve().parents[2]
PAUSE = 0.05  # seconds between two workers' steps: the OpenMP threads of the one before have stopped spinning by then


class Worker:
    """A running worker. row: what it measured, or {"error": ...}."""

    def __init__(self, job: Job) -> None:
        self.variant = job.variant
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process, closed in __exit__
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(job.threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cpu.worker", job.to_json()], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.row: dict[str, Any] = self._read()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    @property
    def alive(self) -> bool:
        return "error" not in self.row

    def step(self) -> dict[str, float]:
        """One step's seconds, wall ("seconds") and of all threads ("cpu"); empty if the worker died."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self._read()
        self.row |= {"error": answer["error"]} if "error" in answer else {}
        return {} if "error" in answer else answer

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self.process.wait()
        self.errors.seek(0)
        last = [text for text in self.errors.read().splitlines() if text.strip()][-12:]
        return {"error": "\n".join(last) or f"ended with {self.process.returncode}"}


@dataclass
class Race:
    """All rows of one bed. tell: called with a line of progress."""

    bed: str
    tell: Callable[[str], None]
    threads: int = 2
    peers: Sequence[Variant] = PEERS
    workers: dict[str, Worker] = field(default_factory=dict)
    times: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def run(self, rounds: int, lowering: str = "inductor") -> list[dict[str, Any]]:
        """Measure every variant, then time them in interleaved rounds. One row each, in the order of the table."""
        with ExitStack() as stack, tempfile.TemporaryDirectory() as place:
            for variant in self.peers:
                self._start(stack, variant, place)
            met = [self.workers[peer.name] for peer in self.peers if self.workers[peer.name].alive]
            for variant in [ours(w.variant.name, w.row["peak"], lowering) for w in met] + [smallest(lowering)]:
                self._start(stack, variant, place)
            for turn in range(rounds):
                self._round(turn)
            return [self._row(worker) for worker in self.workers.values()]

    def _start(self, stack: ExitStack, variant: Variant, place: str) -> None:
        job = Job(self.bed, variant, str(Path(place) / "gradients.pt"), self.threads)
        worker = self.workers[variant.name] = stack.enter_context(Worker(job))
        self.times[variant.name] = []
        if worker.alive:
            self.tell(f"{self.bed}: {variant.name}: {worker.row['transient'] / 2**20:.0f} MiB over what is resident")
        else:
            self.tell(f"{self.bed}: {variant.name}: failed: {worker.row['error'].splitlines()[-1]}")

    def _round(self, turn: int) -> None:
        """Every variant once; each round begins one further on, so that nobody always follows the same neighbour."""
        names = list(self.workers)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            answer = self.workers[name].step() if self.workers[name].alive else {}
            self.times[name].append(answer)
            time.sleep(PAUSE)
        self.tell(f"{self.bed}: round {turn + 1} done")

    def _row(self, worker: Worker) -> dict[str, Any]:
        times = self.times[worker.variant.name]
        return {
            "bed": self.bed,
            "variant": worker.variant.name,
            "peer": worker.variant.peer,
            **worker.row,
            "times": [round(t["seconds"], 4) for t in times if t],
            "cpu_times": [round(t["cpu"], 4) for t in times if t],
        }
