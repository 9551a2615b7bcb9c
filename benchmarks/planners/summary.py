"""The planner tier in one Markdown table: memopt against the best of the others, budget by budget."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.markdown import folded, table
from benchmarks.planners.bench import Row
from benchmarks.planners.marks import SAME, Mark, marks
from benchmarks.planners.registry import PLANNERS

LABELS = ("80%", "60%", "40%", "peak of sqrt_blocks", "peak of every_block", "floor + 2%", "floor - 10%")
LEGEND = (
    "Added step time in %, memopt's, then in brackets that of the best other planner that holds the budget. Bold: "
    "memopt loses, by more added time or by refusing what another holds. Budgets: shares of the peak with everything "
    "kept, peaks of two planners that take none, 2 % above and 10 % below memopt's floor."
)
UNNAMED = ("memopt", "keep_all")


def summary(rows: Sequence[Row]) -> str:
    """The table, its legend, who was left out, and folded what holds and what memopt loses, line by line."""
    lines = [[graph, *(cell(rows, graph, label) for label in LABELS)] for graph in graphs(rows)]
    parts = [
        table(("graph", *LABELS), lines),
        LEGEND,
        left_out(rows),
        folded("what holds and what fails", losses(rows)),
    ]
    return "\n\n".join(part for part in parts if part)


def graphs(rows: Sequence[Row]) -> list[str]:
    """Names in the order of the results."""
    return list(dict.fromkeys(row["graph"] for row in rows))


def cell(rows: Sequence[Row], graph: str, label: str) -> str:
    """ "+3.6 (dtr +4.4)"; "" for a budget that was not asked or memopt was not run at."""
    here = [row for row in rows if (row["graph"], row["label"]) == (graph, label)]
    mine = next((row for row in here if row["planner"] == "memopt"), None)
    if mine is None:
        return ""
    best = least([row for row in here if row["planner"] not in UNNAMED])
    others = f"{best['planner']} {percent(best)}" if best else "none"
    failed = "no plan in time" if mine["note"].startswith("left out") else "refused"
    text = f"{percent(mine) if mine['fits'] else failed} ({others})"
    return f"**{text}**" if lost(mine, best) else text


def least(peers: Sequence[Row]) -> Row | None:
    """The peer that holds the budget and adds least; None if none holds it."""
    order = list(PLANNERS)
    held = [row for row in peers if row["fits"]]
    return min(held, key=lambda row: (row["added_seconds"], order.index(row["planner"])), default=None)


def lost(mine: Row, best: Row | None) -> bool:
    """Whether the peer adds less than memopt, or holds what memopt refuses."""
    if best is None:
        return False
    return not mine["fits"] or best["added_seconds"] < mine["added_seconds"] - SAME


def percent(row: Row) -> str:
    """Added time of the step's."""
    return f"{100 * row['relative']:+.1f}"


def losses(rows: Sequence[Row]) -> str:
    """The marks of the tier, with every row that breaks one."""
    return "\n".join(line for mark in marks(rows) for line in told(mark))


def told(mark: Mark) -> list[str]:
    """A mark as a list item, and one below it for each fault."""
    state = "open" if not mark.seen else "fails" if mark.faults else "holds"
    return [f"- {mark.what}: {state} ({mark.seen} rows)", *(f"  - {fault}" for fault in mark.faults)]


def left_out(rows: Sequence[Row]) -> str:
    """Planners that took too long, by number of budgets; nothing if none did."""
    late = [row["planner"] for row in rows if str(row["note"]).startswith("left out")]
    named = [f"{name} at {late.count(name)} budgets" for name in PLANNERS if name in late]
    return f"Left out, as they took longer than their limit: {', '.join(named)}." if named else ""
