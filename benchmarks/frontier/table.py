"""The frontiers in one Markdown table: all levers together against the best of them alone, budget by budget."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.frontier.curves import ALL, EXACT, Row, seconds
from benchmarks.markdown import sources, table

HEAD = ("step", "budget", "best lever alone", "all together", "bound", "what was taken, MiB")
LEGEND = (
    "Budgets are shares of the free peak, the last of each step 2 % above the floor of all levers together. A tenth of "
    "that peak at most may lie on disk (host memory of a device that is not here: 256 GB), as a disk behind the page "
    "cache takes next to no time and would do alone. Added step time in % as predicted; the bound is a proven one. "
    "Lossy levers together put the gradient off by a tenth at most: measured on a batch for steps of this machine, "
    "assumed for devices that are not here."
)


def summary(rows: Sequence[Row]) -> str:
    """The table, its legend, and what was run."""
    told = (executed(row) for row in rows if "measured" in row)
    return "\n\n".join((table(HEAD, [line(group) for group in groups(rows)]), LEGEND, *told, *sources(rows, "subject")))


def groups(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows by levers, of one step and budget each, in the order of the results."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if "levers" in row:
            found.setdefault((row["subject"], row["budget"]), {})[row["levers"]] = row
    return list(found.values())


def line(group: dict[str, Row]) -> tuple[str, ...]:
    """Of one step and budget."""
    ours, alone = group[ALL], best(group)
    single = f"{added(alone)} {alone['levers']}" if alone["fits"] else "none fits"
    mix = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in ours["mix"].items())
    bound = f"{100 * ours['bound'] / ours['step']:+.1f}" if ours["fits"] else ""
    return ours["subject"], f"{ours['share']:.1%}", single, added(ours), bound, mix


def best(group: dict[str, Row]) -> Row:
    """The single lever that adds least."""
    return min((row for name, row in group.items() if name not in (ALL, EXACT)), key=seconds)


def added(row: Row) -> str:
    """Of the step's time, in %."""
    return f"{100 * row['added'] / row['step']:+.1f}" if row["fits"] else "refused"


def executed(row: Row) -> str:
    """What a run of a mixture showed."""
    equal = "equal" if row["loss_equal"] else "NOT equal"
    return (
        f"Run: {row['subject']} at {row['share']:.1%}, which no lever alone holds: measured {row['measured']:,} of "
        f"{row['budget']:,} bytes, predicted {row['predicted']:,}, loss {equal}, gradient off by "
        f"{row['measured_grad_error'] or 0:.2g}."
    )
