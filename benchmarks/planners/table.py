"""The rows as tables: rich on a terminal, Markdown for the README."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from benchmarks.planners.bench import Row
from benchmarks.planners.registry import PLANNERS


def cell(row: Row | None) -> str:
    """Added time if the budget is held; else what was the matter."""
    if row is None:
        return ""
    if row["fits"]:
        return f"{row['relative']:+.1%}"
    return "none" if row["peak"] is None else f"x{row['peak'] / row['budget']:.2f}"


def detailed(head: Row, rows: Sequence[Row]) -> Table:
    """One graph: a row for each budget and planner."""
    about = f"{head['graph']} ({head['about']}, {head['device']}): {head['steps']} steps, "
    about += f"{head['peak'] / 1e9:.2f} GB and {head['seconds'] * 1e3:.1f} ms with everything kept"
    table = Table("budget", "planner", "peak GB", "holds", "added ms", "added", "bound", "solve s", "note", title=about)
    for row in rows:
        first = row is next(r for r in rows if r["label"] == row["label"])
        table.add_row(f"{row['label']}: {row['budget'] / 1e9:.3f} GB" if first else "", *words(row, head["seconds"]))
    return table


def words(row: Row, seconds: float) -> tuple[str, ...]:
    """One row's cells behind the budget. seconds: of the unchanged step."""
    bound = "" if row["bound"] is None else f"{row['bound'] / seconds:+.2%}"
    if row["peak"] is None:
        return row["planner"], "", "no plan", "", "", bound, f"{row['solve_seconds']:.2f}", row["note"]
    size, held = f"{row['peak'] / 1e9:.3f}", "yes" if row["fits"] else "no"
    time = f"{row['added_seconds'] * 1e3:.3f}", f"{row['relative']:+.2%}"
    return row["planner"], size, held, *time, bound, f"{row['solve_seconds']:.2f}", row["note"]


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of one table: a row for each graph and budget, a column for each planner.

    A cell is the time a plan adds to the step, in bold where nobody adds less; xN: its peak is N budgets.
    """
    names = [name for name in PLANNERS if name != "keep_all" and any(row["planner"] == name for row in rows)]
    yield f"| graph | budget | {' | '.join(names)} |"
    yield "|---|---|" + "--:|" * len(names)
    for graph, label in dict.fromkeys((row["graph"], row["label"]) for row in rows):
        here = {row["planner"]: row for row in rows if (row["graph"], row["label"]) == (graph, label)}
        least = min((row["added_seconds"] for row in here.values() if row["fits"]), default=None)
        cells = [emphasised(here.get(name), least) for name in names]
        yield f"| {graph} | {label} | {' | '.join(cells)} |"


def emphasised(row: Row | None, least: float | None) -> str:
    """The cell, in bold if nobody who holds the budget adds less."""
    best = row is not None and row["fits"] and least is not None and row["added_seconds"] <= least + 1e-9
    return f"**{cell(row)}**" if best else cell(row)
