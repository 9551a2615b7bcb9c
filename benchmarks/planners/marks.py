"""The pass marks of the tier, from its rows. Each says what holds, or lists every row where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.planners.bench import LIMIT, Row

SAME = 1e-9  # of the seconds: two sums of the same floats in another order differ by less
DEEP, QUICK = "llama-3-70b", 5.0  # the graph of 80 layers, and the seconds a plan of it may take


@dataclass(frozen=True)
class Mark:
    """what: the promise. faults: a sentence for each row that breaks it. seen: rows it was checked on."""

    what: str
    seen: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        if not self.seen:
            return f"OPEN   {self.what}: no row to check it on"
        state = "FAILS" if self.faults else "HOLDS"
        return "\n".join([f"{state}  {self.what} ({self.seen} rows)", *(f"         {fault}" for fault in self.faults)])


def marks(rows: Sequence[Row]) -> tuple[Mark, ...]:
    """All of them."""
    mine = [row for row in rows if row["planner"] == "memopt"]
    refused = [row for row in mine if row["note"] == "infeasible"]
    deep = [row for row in mine if row["graph"] == DEEP]
    planned = [row for row in mine if row["peak"] is not None]
    return (
        Mark(f"memopt: an answer within {LIMIT:.0f} s", len(mine), tuple(unanswered(mine))),
        Mark("memopt: no budget violated", len(planned) - len(refused), tuple(violations(planned))),
        Mark("memopt: peak monotone in the budget", len(mine), tuple(rises(mine))),
        Mark("memopt: never slower than a planner that holds the same budget", len(mine), tuple(slower(rows))),
        Mark("memopt: nobody holds a budget that memopt refuses", len(refused), tuple(lower(rows))),
        Mark(f"memopt: 80 layers planned in under {QUICK:.0f} s", len(deep), tuple(late(deep))),
    )


def unanswered(mine: Sequence[Row]) -> Iterator[str]:
    """Budgets for which there was no plan in time."""
    for row in mine:
        if row["peak"] is None:
            yield f"{where(row)}: {row['note']}"


def violations(mine: Sequence[Row]) -> Iterator[str]:
    """Plans that were said to hold and do not."""
    for row in mine:
        if not row["fits"] and row["note"] != "infeasible":
            yield f"{where(row)}: peak {row['peak']} over {row['budget']}; {row['note']}"


def rises(mine: Sequence[Row]) -> Iterator[str]:
    """Budgets whose plan has a larger peak than that of a larger budget."""
    for graph in dict.fromkeys(row["graph"] for row in mine):
        found = sorted((r for r in mine if r["graph"] == graph), key=lambda r: -r["budget"])
        for above, row in pairwise(found):
            if row["peak"] is not None and above["peak"] is not None and row["peak"] > above["peak"]:
                yield f"{where(row)}: peak {row['peak']} over {above['peak']} at {above['budget']}"


def slower(rows: Sequence[Row]) -> Iterator[str]:
    """Where a peer holds the budget that memopt holds as well, with fewer added seconds."""
    for mine, peers in by_budget(rows):
        for peer in peers:
            if mine["fits"] and peer["added_seconds"] < mine["added_seconds"] - SAME:
                yield (
                    f"{where(mine)}: {peer['planner']} {peer['relative']:+.2%} at peak {peer['peak']}, "
                    f"memopt {mine['relative']:+.2%} at {mine['peak']}"
                )


def lower(rows: Sequence[Row]) -> Iterator[str]:
    """Where a peer holds a budget that memopt refuses."""
    for mine, peers in by_budget(rows):
        for peer in peers:
            if not mine["fits"] and mine["peak"] is not None:
                yield (
                    f"{where(mine)}: {peer['planner']} holds {peer['budget']} at {peer['relative']:+.2%}, "
                    f"peak {peer['peak']}; memopt's floor is {mine['floor']}"
                )


def by_budget(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """(memopt's row, rows of peers that hold the same budget)."""
    for mine in (row for row in rows if row["planner"] == "memopt"):
        same = [r for r in rows if (r["graph"], r["budget"]) == (mine["graph"], mine["budget"]) and r is not mine]
        yield mine, [row for row in same if row["fits"] and row["label"] == mine["label"]]


def late(deep: Sequence[Row]) -> Iterator[str]:
    """Plans of the deepest graph that took too long."""
    for row in deep:
        if row["solve_seconds"] >= QUICK:
            yield f"{where(row)}: {row['solve_seconds']} s"


def where(row: Row) -> str:
    """Graph and budget, in words."""
    return f"{row['graph']} at {row['label']}"
