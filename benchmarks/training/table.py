"""What training with each plan led to, in one Markdown table: quality over seeds, and what was saved for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.markdown import sources, table

Row = Mapping[str, Any]
HEAD = ("task", "plan", "quality", "peak", "gradient off by", "seeds")


def summary(rows: Sequence[Row]) -> str:
    """A line a task and plan, and what was run."""
    kinds = dict.fromkeys((row["task"], row["plan"]) for row in rows)
    lines = table(HEAD, [line([r for r in rows if (r["task"], r["plan"]) == kind]) for kind in kinds])
    return "\n\n".join((lines, *sources(rows, "task")))


def line(rows: Sequence[Row]) -> tuple[str, ...]:
    """Of the runs of one task with one plan."""
    first, quality = rows[0], [row["quality"] for row in rows]
    spread = f" ± {stdev(quality):.3f}" if len(quality) > 1 else ""
    peak = f"{first['peak'] / first['free']:.0%}" if "peak" in first else "100%"
    error = f"{max(row['grad_error'] for row in rows):.2g}" if first.get("grad_error") else "0"
    task = f"{first['task']}, {first['metric']}"
    return task, first["plan"], f"{mean(quality):.3f}{spread}", peak, error, str(len(rows))
