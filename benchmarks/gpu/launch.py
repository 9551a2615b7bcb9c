"""A row in a process of its own, until the time is up. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.rows import Job, Row

ROOT = Path(__file__).resolve().parents[2]
LEAST = 5.0  # seconds: loading torch takes longer, so a row is not begun with less


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: None if the time was up and it was stopped."""

    code: int | None
    out: str = ""
    err: str = ""


Launch = Callable[[Sequence[str], float, str], Ended]


def launched(words: Sequence[str], limit: float, device: str) -> Ended:
    """Run the command in a process group of its own for `limit` seconds at most, then end the whole group.

    The group, as Inductor's compile workers hold the same pipes: waiting for those would outlast the limit.
    """
    with subprocess.Popen(
        words, cwd=ROOT, env=environment(device), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        process_group=0,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return Ended(None)
        finally:  # also where the user stops the command
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return Ended(process.returncode, out, err)


def environment(device: str) -> dict[str, str]:
    """This process's, with the checkout on the path. On CUDA with expandable segments, unless the user configured
    torch's allocator: without them a block of up to 1 MiB more than asked is not split and counts as allocated."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if device == "cuda" else {}
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ:  # the name of torch before 2.9, which it still reads
        settings = {}
    return {**settings, **os.environ, "PYTHONPATH": path}


def run_row(job: Job, deadline: float, clock: Callable[[], float] = time.monotonic, launch: Launch = launched) -> Row:
    """Run it until the deadline, a time of the clock. What goes wrong is its "error"; what it lacks, "absent"."""
    row: Row = asdict(job)
    if job.needs and find_spec(job.needs) is None:
        return row | {"absent": job.needs}
    left = deadline - clock()
    if left < LEAST:
        return row | {"skipped": "no time was left"}
    ended = launch([sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(asdict(job))], left, job.device)
    if ended.code is None:
        return row | {"skipped": f"cut off after {left:.0f} s"}
    lines = ended.out.splitlines()
    if ended.code == 0 and lines:
        return row | dict(json.loads(lines[-1]))
    return row | {"error": "\n".join(ended.err.splitlines()[-12:]) or f"ended with {ended.code}"}
