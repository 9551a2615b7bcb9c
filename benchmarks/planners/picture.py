"""Frontiers of the planner tier: one panel a graph, one curve a planner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.picture import OURS, Panel, Point, draw, frontier
from benchmarks.planners.bench import Row
from benchmarks.planners.registry import PLANNERS

# One of each kind: a decoder, a larger one, an encoder, images with attention, with convolutions, with long skips.
CHOSEN = ("gpt2", "llama-3.2-1b", "bert-base", "vit-base", "resnet-50", "unet")


def panels(heads: Sequence[Row], rows: Sequence[Row]) -> dict[str, Panel]:
    """The chosen graphs that were planned; all graphs where none of them was."""
    ran = {row["graph"] for row in rows}
    chosen = [name for name in CHOSEN if name in ran] or [head["graph"] for head in heads if head["graph"] in ran]
    known = {head["graph"]: head for head in heads}
    return {f"{name}, {known[name]['about']}": panel(known[name], rows) for name in chosen}


def panel(head: Row, rows: Sequence[Row]) -> Panel:
    """Each planner's plans by peak, a share of that with everything kept, and step time, where no other plan of its
    own is better in both."""
    found: dict[str, list[Point]] = {}
    for name in PLANNERS:
        mine = [r for r in rows if r["graph"] == head["graph"] and r["planner"] == name and r["peak"] is not None]
        points = frontier([(r["peak"] / head["peak"], 1 + r["relative"]) for r in mine])
        if points and name != "keep_all":
            found[OURS if name == "memopt" else name] = points
    return found


def picture(heads: Sequence[Row], rows: Sequence[Row], path: Path) -> None:
    """Write it as SVG."""
    if made := panels(heads, rows):
        draw(made, path, "peak, of that with everything kept", "step time, of that with everything kept")
