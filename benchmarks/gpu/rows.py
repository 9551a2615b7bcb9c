"""Which rows there are, in which order, and what is said of each. Standard library only: rows run in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row. budget: memopt's, as its doors take it; "smallest" for its floor; "" for a peer.

    checkpoint, compiled, share: the peer's. steps: timed ones, after two that warm up. peer: whose peak the budget is.
    """

    model: str
    device: str
    batch: int
    seq: int
    dtype: str
    name: str = ""
    budget: str = ""
    peer: str = ""
    checkpoint: str = ""
    compiled: bool = False
    share: float | None = None
    lowering: str = "inductor"
    steps: int = 8


def plan_of_rows(job: Job, budget: str, done: Sequence[Row], tiny: bool) -> Iterator[Job]:
    """The rows, most telling first, as time may run out. done: those that have run; budgets are taken from them."""
    peer = replace(job, lowering="")
    yield replace(peer, name="eager")
    if not tiny:
        yield replace(job, name=f"memopt at {budget}", budget=budget)
    yield replace(peer, name="HF checkpointing", checkpoint="blocks")
    if not tiny:
        yield replace(peer, name="torch.compile", compiled=True)
        yield replace(peer, name="torch.compile + HF checkpointing", compiled=True, checkpoint="blocks")
    for row in [row for row in done if not row["budget"] and "peak" in row]:
        yield replace(job, name=f"memopt at {row['name']}", budget=str(row["peak"]), peer=row["name"])
    yield replace(job, name="memopt, smallest", budget="smallest")
    for share in () if tiny else (0.5, 0.2):
        name = f"torch.compile, budget {share}"
        yield replace(peer, name=name, compiled=True, share=share)
        yield from (
            replace(job, name=f"memopt at {name}", budget=str(row["peak"]), peer=name)
            for row in done
            if row["name"] == name and "peak" in row
        )


def run_row(job: Job, deadline: float) -> Row:
    """Run it in a process of its own until the deadline (time.monotonic). What goes wrong is its "error"."""
    left = deadline - time.monotonic()
    if left < 1:
        return asdict(job) | {"skipped": "no time was left"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    words = [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(asdict(job))]
    try:
        ran = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left, check=False
        )
    except subprocess.TimeoutExpired:
        return asdict(job) | {"skipped": f"cut off after {left:.0f} s"}
    lines = ran.stdout.splitlines()
    if ran.returncode == 0 and lines:
        return asdict(job) | dict(json.loads(lines[-1]))
    return asdict(job) | {"error": "\n".join(ran.stderr.splitlines()[-12:]) or f"ended with {ran.returncode}"}


def told(row: Row) -> str:
    """One line on a row."""
    if "error" in row or "skipped" in row:
        last = (row.get("error") or row["skipped"]).strip().splitlines()[-1]
        return f"{row['name']:38} {'failed' if 'error' in row else 'left out'}: {last[:200]}"
    text = f"{row['name']:38} {row['peak'] / GIB:7.3f} GiB allocated"
    if row["reserved"]:
        text += f", {row['reserved'] / GIB:7.3f} GiB reserved"
    text += f", {row['seconds']:.4f} s a step"
    if "planned" in row:
        within = {True: ", also reserved", False: ", but not reserved", None: ""}[row.get("held_reserved")]
        text += f", planned {row['planned'] / GIB:.3f} ({row['prediction_error']:+.2%}), "
        text += f"{'held' if row['held'] else 'EXCEEDED'}{within}"
    return text


def overall(rows: Sequence[Row]) -> str:
    """Budgets held, the worst prediction, and memopt's seconds over those of the peer whose bytes it was given."""
    ours = [row for row in rows if "planned" in row]
    if not ours:
        return "no row of memopt's ran"
    named = {row["name"]: row for row in rows}
    worst = max(abs(row["prediction_error"]) for row in ours)
    text = f"{sum(row['held'] for row in ours)} of {len(ours)} budgets held; worst prediction off by {worst:.2%}"
    for row in ours:
        if row["peer"]:
            text += f"\nat the peak of {row['peer']}: x {row['seconds'] / named[row['peer']]['seconds']:.3f} its time"
    return text
