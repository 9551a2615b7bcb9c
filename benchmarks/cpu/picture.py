"""The frontier of one bed: step time over eager's, against the peak over what is resident."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks import picture
from benchmarks.cpu.summary import MIB, Row, ratios, usable
from benchmarks.picture import OURS, Point

BUDGETS = "torch.compile, budgets"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the picture as SVG. Deterministic: the same rows give the same bytes. Nothing without a row of eager's."""
    if found := curves(rows):
        picture.draw({title: found}, path, "peak over what is resident, MiB", "step time over eager's")


def curves(rows: Sequence[Row]) -> Mapping[str, Sequence[Point]]:
    """A curve of memopt's rows, one of torch.compile's under its budgets, a dot for each other peer."""
    eager = next((row for row in rows if row["variant"] == "eager" and usable(row)), None)
    found: dict[str, list[Point]] = {}
    for row in rows if eager is not None else ():
        if usable(row):
            found.setdefault(curve(row["variant"]), []).append((row["transient"] / MIB, over(row, eager)))
    return {name: sorted(points) for name, points in found.items()}


def curve(variant: str) -> str:
    """The curve a row is a point of."""
    if variant.startswith("memopt"):
        return OURS
    return BUDGETS if variant.startswith("torch.compile, budget") else variant


def over(row: Row, eager: Row) -> float:
    """Median ratio of the row's rounds to eager's; of medians where one has fewer rounds."""
    if len(row["times"]) == len(eager["times"]):
        return ratios(row, eager)[1]
    return float(median(row["times"]) / median(eager["times"]))
