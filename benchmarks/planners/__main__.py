"""Every planner on every graph: `python -m benchmarks.planners` (`make bench-planners`), under fifteen minutes.

Graphs are captured once and kept in --graphs; two processes capture and plan them side by side, the largest first. What
the time does not suffice for is left out and named. Rows go to planners.jsonl, tables and marks to stdout, progress to
stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from rich.console import Console

from benchmarks.planners.ahead import Turn, side_by_side, tell
from benchmarks.planners.bench import Row
from benchmarks.planners.graphs import SOURCES
from benchmarks.planners.marks import marks
from benchmarks.planners.picture import picture
from benchmarks.planners.registry import PLANNERS, SLOW
from benchmarks.planners.table import detailed, markdown
from benchmarks.record import RESULTS, command, read_lines, surroundings, write_lines

GRAPHS = Path(__file__).resolve().parent / "graphs"  # not committed: 2.5 MB that any machine makes anew
MINUTES = 12.5  # a capture that is under way then takes up to two more


def run(asked: argparse.Namespace) -> list[Row]:
    """All headers and rows. The slow planners come last, so that they and not a graph are left out."""
    until = time.monotonic() + 60 * asked.minutes
    quick = [name for name in asked.planner if name not in SLOW]
    slow = [name for name in asked.planner if name in SLOW]
    first = side_by_side([Turn(graph, quick, asked.graphs, until) for graph in asked.graph])
    wanted = {graph: {row["label"]: row["budget"] for row in rows} for graph, (_, rows) in first.items()}
    late = [Turn(graph, slow, asked.graphs, until, wanted[graph]) for graph, (head, _) in first.items() if head]
    second = side_by_side(late) if slow else {}
    heads = [head for head, _ in first.values() if head is not None]
    return [*heads, *(row for found in (first, second) for _, rows in found.values() for row in rows)]


def by_planner(lines: Sequence[Row]) -> list[Row]:
    """The rows among the lines of results."""
    return [line for line in lines if "planner" in line]


def show(lines: Sequence[Row]) -> int:
    """Tables and marks; how many marks fail."""
    heads = [line for line in lines if "planner" not in line and "graph" in line]
    rows = by_planner(lines)
    console = Console(width=150)
    for head in heads:
        mine = [r for r in rows if r["graph"] == head["graph"]]
        console.print(detailed(head, sorted(mine, key=lambda r: (-r["budget"], list(PLANNERS).index(r["planner"])))))
    found = marks(rows)
    for mark in found:
        console.print(str(mark), markup=False, highlight=False)
    return sum(bool(mark.faults) for mark in found)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.planners", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--graph", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--planner", nargs="+", choices=list(PLANNERS), default=list(PLANNERS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--graphs", type=Path, default=GRAPHS, help="folder of the captured graphs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="what is not done by then is left out")
    parser.add_argument("--table", action="store_true", help="only print the last results, as Markdown")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run, or only print what was run. 0 also where marks fail: a peer that wins is a result, not an error."""
    asked = arguments(given)
    path = asked.results / "planners.jsonl"
    if asked.table:
        print("\n".join(markdown(by_planner(read_lines(path)))))
        return 0
    started = time.monotonic()
    lines = run(asked)
    typed = command("planners", sys.argv[1:] if given is None else given)
    head = {"surroundings": surroundings(), "seconds": round(time.monotonic() - started), "command": typed}
    write_lines(path, [head, *lines])
    picture([line for line in lines if "planner" not in line], by_planner(lines), path.with_suffix(".svg"))
    failing = show(lines)
    tell(f"{failing} marks fail; {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
