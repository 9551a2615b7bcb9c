"""Workers side by side: each compiled in its own process, then stepped one at a time, round after round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cpu.worker import Job
from benchmarks.peers import BISECTED, COMPILED, PEERS, Variant, ours, smallest

ROOT = Path(__file__).resolve().parents[2]
FIRST = 0.1, 0.4  # shares of torch's budget that are tried first; where neither fits, none is hoped for
PROBES = 1  # times two more are tried at once
STEPS = 3  # of a variant in each round, of which the fastest counts: memopt's guard profiles the 2nd, 4th, 8th ...
AT_ONCE = 2  # workers being compiled: most of that is one thread's work, and nothing is timed meanwhile
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
        self.stop()

    def stop(self) -> None:
        """End the process, if it has not ended; nothing may be asked of it from here on."""
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


def between(ran: Mapping[float, int], goal: int) -> tuple[float, float]:
    """The shares to try next: thirds of the way from the largest that fits (0 if none) to the least above it that ran
    (1)."""
    low = max((share for share, peak in ran.items() if peak <= goal), default=0.0)
    high = min((share for share in ran if share > low), default=1.0)
    return low + (high - low) / 3, low + (high - low) * 2 / 3


def order(peers: Mapping[str, str], turn: int) -> list[str]:
    """Variants in the order of one round. peers: the peer each one answers, empty for a peer.

    Who is compared stands side by side, as a machine's speed drifts within a round; who is first of them alternates,
    and each round begins one further on, so that nobody always follows the same neighbour.
    """
    groups = [[name, *(other for other in peers if peers[other] == name)] for name in peers if not peers[name]]
    shift = turn % len(groups)
    return [name for group in groups[shift:] + groups[:shift] for name in (group[::-1] if turn % 2 else group)]


@dataclass
class Race:
    """All rows of one bed. tell: called with a line of progress. bisect: torch's budget, besides the peers' shares."""

    bed: str
    tell: Callable[[str], None]
    threads: int = 2
    peers: Sequence[Variant] = PEERS
    bisect: bool = True
    workers: dict[str, Worker] = field(default_factory=dict)
    times: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def run(self, rounds: int, lowering: str = "auto") -> list[dict[str, Any]]:
        """Measure every variant, then time them in interleaved rounds. One row each, in the order of the table."""
        with ExitStack() as stack, tempfile.TemporaryDirectory() as place:
            self._start(stack, self.peers[:1], place)  # leaves the gradients the others are compared with
            self._start(stack, self.peers[1:], place)
            if self.bisect:
                self._bisect(stack, place)
            met = [worker for worker in self.workers.values() if worker.alive]
            answers = [ours(w.variant.name, w.row["peak"], lowering) for w in met]
            self._start(stack, answers[:1], place)  # leaves what it measured of operations, which the others read
            self._start(stack, [smallest(lowering), *answers[1:]], place)  # the slowest to plan first
            for turn in range(rounds):
                self._round(turn)
            return [self._row(worker) for worker in self.workers.values()]

    def _bisect(self, stack: ExitStack, place: str) -> None:
        """torch's budget once more: the largest share found whose real peak is within half of what torch.compile takes
        beyond the resident bytes. What is worse is let go again."""
        whole = self.workers.get(COMPILED)
        ran = {w.variant.share: w.row["peak"] for w in self.workers.values() if w.alive and w.variant.share is not None}
        if whole is None or not whole.alive:
            return
        goal, best = whole.row["resident"] + whole.row["transient"] // 2, 0.0
        for probe in range(PROBES + 1):
            if probe and min(ran.values()) > goal:
                return self.tell(f"{self.bed}: torch's budget fits at no share tried")
            shares = between(ran, goal) if probe else FIRST
            tried = self._several(stack, [replace(BISECTED, share=share) for share in shares], place)
            for share, worker in zip(shares, tried, strict=True):
                ran[share] = worker.row["peak"] if worker.alive else goal + 1
                self.tell(f"{self.bed}: budget {share:.3f}: {'fits' if ran[share] <= goal else 'does not fit'}")
                if ran[share] <= goal and share > best:
                    best, worker.row["share"] = share, share
                    self._enter(BISECTED.name, worker)
                else:
                    worker.stop()

    def _start(self, stack: ExitStack, variants: Sequence[Variant], place: str) -> None:
        for variant, worker in zip(variants, self._several(stack, variants, place), strict=True):
            self._enter(variant.name, worker)

    def _several(self, stack: ExitStack, variants: Sequence[Variant], place: str) -> Iterator[Worker]:
        """A worker each, in order, a few compiled at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(lambda v: self._worker(stack, v, place), variants)

    def _worker(self, stack: ExitStack, variant: Variant, place: str) -> Worker:
        return stack.enter_context(Worker(Job(self.bed, variant, str(Path(place) / "gradients.pt"), self.threads)))

    def _enter(self, name: str, worker: Worker) -> None:
        """Have the worker take part under this name, instead of one that did."""
        if name in self.workers:
            self.workers[name].stop()
        self.workers[name], self.times[name] = worker, []
        if worker.alive:
            self.tell(f"{self.bed}: {name}: {worker.row['transient'] / 2**20:.0f} MiB over what is resident")
        else:
            self.tell(f"{self.bed}: {name}: failed: {worker.row['error'].splitlines()[-1]}")

    def _round(self, turn: int) -> None:
        """Every variant once, in the order of this round."""
        peers = {name: worker.variant.peer for name, worker in self.workers.items()}
        for name in order(peers, turn):
            steps = [self.workers[name].step() for _ in range(STEPS) if self.workers[name].alive]
            self.times[name].append(min(steps, key=lambda step: step.get("seconds", inf), default={}))
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
