"""One work: its budgets, every planner on each, scored. Rows are plain values, as they go into the results."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from types import FrameType
from typing import Any

from benchmarks.planners.answer import Answer
from benchmarks.planners.export import Work
from benchmarks.planners.keep_all import unchanged
from benchmarks.planners.memopt_plan import floor
from benchmarks.planners.registry import planner
from benchmarks.planners.schedule import ScheduleError, check
from benchmarks.planners.simulator import Score, simulate, up
from benchmarks.planners.sqrt_blocks import every_block, sqrt_blocks

LIMIT = 30.0  # seconds one planner may take for one budget
SHARES = (0.8, 0.6, 0.4)  # of keep-all's peak
NEAR, BELOW = 1.02, 0.9  # of memopt's floor: just above, and where only others might reach
LABELS = (
    *(f"{share:.0%}" for share in SHARES),
    "floor + 2%",
    "floor - 10%",
    "peak of every_block",
    "peak of sqrt_blocks",
)
TELLING = frozenset({"60%", "floor + 2%"})
BELOW_FLOOR = frozenset({"floor - 10%"})
Row = dict[str, Any]


class TooLong(Exception):
    """A planner went over its limit."""


def budgets(work: Work, keep: Score) -> dict[str, int]:
    """Label -> bytes, the largest first. Left out: what not even the inputs fit in."""
    least = floor(work)
    wanted = {f"{share:.0%}": round(share * keep.peak) for share in SHARES}
    wanted |= {"floor + 2%": round(NEAR * least), "floor - 10%": round(BELOW * least)}
    wanted |= {"peak of every_block": score(work, every_block(work, 0)).peak}
    wanted |= {"peak of sqrt_blocks": score(work, sqrt_blocks(work, 0)).peak}
    resident = sum(up(work.graph.storages[name].nbytes, work.block) for name in work.graph.input_storages)
    kept = {label: size for label, size in wanted.items() if resident < size < keep.peak}
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def baseline(work: Work) -> Score:
    """The step as it is."""
    return simulate(work.graph, work.seconds, unchanged(work), work.block)


def score(work: Work, answer: Answer) -> Score:
    """The neutral simulator on an answer that has a schedule, once it is sure to be the same computation."""
    assert answer.schedule is not None
    return simulate(work.graph, work.seconds, check(work.graph, answer.schedule), work.block)


def row(work: Work, keep: Score, label: str, budget: int, name: str, limit: float) -> Row:
    """One planner at one budget. Bytes and seconds; `relative`: added seconds a second of the unchanged step."""
    started = perf_counter()
    try:
        with alarm(limit):
            answer = planner(name)(work, budget)
    except TooLong:
        answer = Answer(None, note=f"left out: over {limit:.0f} s")
    solved = perf_counter() - started
    out: Row = {"graph": work.name, "label": label, "budget": budget, "planner": name, "peak": None, "fits": False,
                "added_seconds": None, "relative": None, "bound": finite(answer.bound), "floor": answer.floor,
                "solve_seconds": round(solved, 3), "note": answer.note}  # fmt: skip
    if answer.schedule is None:
        return out
    try:
        found = score(work, answer)
    except ScheduleError as refused:
        return out | {"note": f"refused: {refused}"}
    added = found.seconds - keep.seconds
    out |= {"peak": found.peak, "fits": found.peak <= budget, "added_seconds": added}
    return out | {"relative": added / keep.seconds, "runs": len(answer.schedule)}


def finite(value: float | None) -> float | None:
    """JSON has no infinity: a bound of a program without a solution is none."""
    return value if value is not None and value != float("inf") else None


def header(work: Work, wanted: Mapping[str, int]) -> Row:
    """What is known of a work before anybody plans. wanted: its budgets."""
    keep = baseline(work)
    sizes = {"steps": len(work.graph.steps), "peak": keep.peak, "seconds": keep.seconds}
    return {"graph": work.name, "about": work.about, "device": work.device, **sizes, "budgets": {**wanted},
            "notes": list(work.notes)}  # fmt: skip


@contextmanager
def alarm(limit: float) -> Iterator[None]:
    """Raise TooLong in the block after `limit` seconds (of the clock; between two bytecodes)."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
