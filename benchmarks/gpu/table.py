"""The GPU tier as Markdown and as a picture, from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.rows import EAGER, REFERENCES, Row
from benchmarks.gpu.told import GIB, outcome, relative
from benchmarks.markdown import table
from benchmarks.picture import OURS, Point
from benchmarks.picture import draw as draw_panels

HEAD = (
    "", "budget, GiB", "predicted", "allocated", "reserved", "held", "runs with, to reserve", "step, s", "x reference",
    "first loss differs by",
)  # fmt: skip
LEGEND = (
    "GiB; held: allocated within the budget; runs with: how much of its budget the process had to be let reserve. The "
    "reference is eager, or HF checkpointing where eager does not fit, timed by the same command."
)


def markdown(rows: Sequence[Row]) -> str:
    """A line a row, those that did not run with why."""
    first = next((row["loss"] for row in rows if row["name"] in REFERENCES and "loss" in row), None)
    return table(HEAD, [cells(row, first) for row in rows]) + "\n\n" + LEGEND


def cells(row: Row, first: float | None) -> tuple[str, ...]:
    """One row's line. first: the reference's first loss."""
    asked = gib(int(row["budget"])) if row["budget"].isdecimal() else row["budget"]
    if why := outcome(row):
        return row["name"], asked, *[""] * (len(HEAD) - 3), why
    ours = "planned" in row
    return (
        row["name"],
        asked,
        f"{gib(row['planned'])} ({row['prediction_error']:+.2%})" if ours else "",
        gib(row["peak"]),
        gib(row["reserved"]),
        ("yes" if row["held"] else "NO") if ours else "",
        limit(row) if ours else "",
        f"{row['seconds']:.4f}",
        f"{relative(row):.3f}" if "reference_seconds" in row else "",
        f"{abs(row['loss'] / first - 1):.0e}" if first else "",
    )


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.3f}"


def limit(row: Row) -> str:
    """What the process was let reserve when the step still ran, of the budget."""
    if "limit" not in row:
        return ""
    return "more than tried" if row["limit"] is None else f"{row['limit'] / row['asked']:.0%}"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """The frontier as SVG; nothing if no row was timed beside a reference."""
    if found := curves(rows):
        draw_panels({title: found}, path, "peak allocated, GiB", "step time over the reference's")


def curves(rows: Sequence[Row]) -> Mapping[str, Sequence[Point]]:
    """A curve of memopt's rows, one of torch.compile's budgets, a dot for each other peer."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        if "reference_seconds" in row and not row["name"].startswith(f"{EAGER},"):
            found.setdefault(curve(row), []).append((row["peak"] / GIB, relative(row)))
    return {name: sorted(points) for name, points in found.items()}


def curve(row: Row) -> str:
    """The curve a row is a point of."""
    if row["budget"]:
        return OURS
    return "torch.compile, budgets" if row["share"] is not None else str(row["name"])
