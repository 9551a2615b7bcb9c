"""Every planner on every graph: `python -m benchmarks.planners` (`make bench-planners`), under fifteen minutes.

Graphs are captured once and kept in --graphs; two processes capture and plan them side by side, the largest first, and
two telling budgets of every graph before any other budget. What the time does not suffice for is left out and named.
Rows go to planners.jsonl, tables and marks to stdout, progress to stderr.
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
from benchmarks.planners.bench import BELOW_FLOOR, LABELS, TELLING, Row
from benchmarks.planners.graphs import SOURCES
from benchmarks.planners.marks import marks
from benchmarks.planners.picture import picture
from benchmarks.planners.registry import PLANNERS, SLOW
from benchmarks.planners.table import detailed, markdown
from benchmarks.record import RESULTS, command, read_lines, surroundings, write_lines

GRAPHS = Path(__file__).resolve().parent / "graphs"  # not committed: 2.5 MB that any machine makes anew
MINUTES = 13.0  # a planner that is under way then takes up to half a minute more


def run(asked: argparse.Namespace) -> list[Row]:
    """All headers and rows. The telling budgets of every graph come first, then the slow planners on those, then what
    lies below memopt's floor."""
    until = time.monotonic() + 60 * asked.minutes
    quick = [name for name in asked.planner if name not in SLOW]
    slow = [name for name in asked.planner if name in SLOW]
    heads: dict[str, Row] = {}
    rows: dict[str, list[Row]] = {graph: [] for graph in asked.graph}
    rest = frozenset(LABELS) - TELLING - BELOW_FLOOR
    for names, labels in ((quick, TELLING), (slow, TELLING), (quick, BELOW_FLOOR), (quick, rest)):
        known = {graph: head["budgets"] for graph, head in heads.items()}
        turns = [
            Turn(graph, names, asked.graphs, until, labels, known.get(graph, {})) for graph in asked.graph if names
        ]
        for graph, (head, found) in side_by_side(turns).items():
            heads |= {graph: head} if head else {}
            rows[graph] += found
    return [*heads.values(), *(row for found in rows.values() for row in found)]


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
