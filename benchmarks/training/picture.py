"""Loss curves: one panel a task, one line a plan, the mean over seeds, and a band from the least to the greatest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.training.tasks import TITLES

WINDOW = 10  # steps a point is the mean of
COLOURS = {"plain": "#7f8c8d", "exact": "#c0392b", "int8": "#2980b9", "int4": "#8e44ad", "fewbit": "#27ae60"}


def smooth(losses: Sequence[float]) -> list[float]:
    """Means of WINDOW steps."""
    return [mean(losses[at : at + WINDOW]) for at in range(0, len(losses) - WINDOW + 1, WINDOW)]


def draw(rows: Sequence[Mapping[str, Any]], path: Path, colours: Mapping[str, str] = COLOURS) -> None:
    """Write the curves as SVG; the same rows give the same bytes. colours: of the plans, in the order to draw them."""
    import matplotlib
    from matplotlib.figure import Figure

    titles = {task: TITLES[task] for task in dict.fromkeys(row["task"] for row in rows)}
    with matplotlib.rc_context({"svg.hashsalt": "memopt", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(4 * len(titles), 3.4), layout="constrained")
        for axes, (task, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
            for plan, colour in colours.items():
                curves = [smooth(r["losses"]) for r in rows if (r["task"], r["plan"]) == (task, plan)]
                if curves and curves[0]:
                    points = list(zip(*curves, strict=False))  # a run that left all bounds ends early
                    steps = [WINDOW * (at + 1) for at in range(len(points))]
                    axes.plot(steps, [mean(p) for p in points], color=colour, label=plan, linewidth=1.2)
                    axes.fill_between(
                        steps, [min(p) for p in points], [max(p) for p in points], color=colour, alpha=0.1
                    )
            axes.set(title=title, xlabel="step", ylabel="loss")
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
