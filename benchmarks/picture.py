"""Frontiers as pictures: step-time ratio over peak, one curve a peer, memopt's in red. SVG, and deterministic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

Point = tuple[float, float]  # (peak, step-time ratio)
Panel = Mapping[str, Sequence[Point]]  # name of a curve -> its points

OURS = "memopt"
RED = "#c0392b"
COLUMNS = 3
TALLEST = 2.2  # the step-time ratio at which panels end: a peer that takes longer leaves the picture there


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other one is below in both, by rising peak."""
    best: list[Point] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def draw(panels: Mapping[str, Panel], path: Path, across: str, up: str) -> None:
    """Write the panels, titled by their keys, into one SVG with one legend. across, up: labels of the axes.

    A curve of one point is a dot. All panels give a name the same colour and mark.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = sorted(dict.fromkeys(name for panel in panels.values() for name in panel), key=lambda name: name == OURS)
    styles = style(names)
    columns = min(COLUMNS, len(panels))
    rows = ceil(len(panels) / columns)
    with matplotlib.rc_context({"svg.hashsalt": "memopt", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(max(8, 3.6 * columns), 3.2 * rows + 0.9), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (title, panel) in zip(grid, panels.items(), strict=False):
            _panel(axes, title, panel, styles)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.supxlabel(across, fontsize=10)
        figure.supylabel(up, fontsize=10)
        handles = {n: h for axes in grid for h, n in zip(*axes.get_legend_handles_labels(), strict=True)}
        drawn = [name for name in names if name in handles]
        looks = [handles[name] for name in drawn]
        figure.legend(looks, drawn, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def style(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and mark of each name, by its place."""
    from matplotlib import color_sequences

    others = [name for name in names if name != OURS]
    colours = [c for place, c in enumerate(color_sequences["tab10"]) if place != 3]  # tab10's red is too near ours
    looks = zip(others, cycle(colours), cycle("ov^<>DPX*h"), strict=False)
    found: dict[str, dict[str, Any]] = {
        name: {"color": colour, "marker": mark, "linewidth": 1, "markersize": 4} for name, colour, mark in looks
    }
    return found | {OURS: {"color": RED, "marker": "s", "linewidth": 2, "markersize": 5, "zorder": 3}}


def _panel(axes: Any, title: str, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> None:
    for name, points in panel.items():
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, label=name, **styles[name])
    axes.set_title(title, fontsize=9)
    top = max((y for points in panel.values() for _, y in points), default=TALLEST)
    if top > TALLEST:
        axes.set_ylim(top=TALLEST)
    axes.grid(visible=True, color="#dddddd", linewidth=0.5)
