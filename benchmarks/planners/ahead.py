"""Graphs side by side: each captured, where its file is missing, and planned by one of two processes."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.planners.bench import LIMIT, Row, baseline, budgets, header, row
from benchmarks.planners.export import Work, load, save
from benchmarks.planners.graphs import captured

AT_ONCE = 2  # processes: every planner uses one thread


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def exported(name: str, folder: Path) -> Path:
    """The graph's file, captured if it is not there."""
    path = folder / f"{name}.json.gz"
    if not path.exists():
        save(captured(name, tell), path)
    return path


def planned(work: Work, names: Sequence[str], wanted: Mapping[str, int], until: float) -> Iterator[Row]:
    """The rows of one work while there is time. wanted: its budgets in bytes, by label."""
    keep, began = baseline(work), time.monotonic()
    for label, budget in wanted.items():
        for name in names:
            if time.monotonic() > until:
                tell(f"{work.name} at {label}: {name} left out, no time")
                continue
            yield row(work, keep, label, budget, name, LIMIT)
    tell(f"{work.name}: {', '.join(names)} at {', '.join(wanted)} in {time.monotonic() - began:.0f} s")


@dataclass(frozen=True)
class Turn:
    """Planners on one graph. folder: of the graphs. until: when to stop. labels: the budgets to plan for; known: all of
    them in bytes, if an earlier turn found them."""

    graph: str
    planners: Sequence[str]
    folder: Path
    until: float
    labels: Collection[str]
    known: Mapping[str, int]

    def run(self) -> tuple[Row | None, list[Row]]:
        """(header, rows); nothing where there is no time left to capture the graph."""
        if time.monotonic() > self.until:
            tell(f"{self.graph}: {', '.join(self.planners)} left out, no time")
            return None, []
        work = load(exported(self.graph, self.folder))
        known = self.known or budgets(work, baseline(work))
        wanted = {label: size for label, size in known.items() if label in self.labels}
        return header(work, known), list(planned(work, self.planners, wanted, self.until))


def side_by_side(turns: Sequence[Turn]) -> dict[str, tuple[Row | None, list[Row]]]:
    """What came of each turn, by graph, in their order. The last ones are begun first: they are the largest graphs."""
    if len(turns) == 1:
        return {turn.graph: turn.run() for turn in turns}
    with ProcessPoolExecutor(AT_ONCE, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {turn.graph: pool.submit(turn.run) for turn in reversed(turns)}
        return {turn.graph: jobs[turn.graph].result() for turn in turns}
