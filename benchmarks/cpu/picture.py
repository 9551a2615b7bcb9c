"""The frontier as a picture: transient MiB across, seconds up; peers as dots, memopt as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu.summary import MIB, Row, seconds, usable


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the picture as SVG. Deterministic: the same rows give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "memopt", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        timed = [row for row in rows if usable(row)]
        peers = [row for row in timed if not row["variant"].startswith("memopt")]
        ours = sorted((row for row in timed if row["variant"].startswith("memopt")), key=lambda row: row["transient"])
        for row in peers:
            axes.annotate(row["variant"], _point(row), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.plot(*_columns(peers), "o", color="#777777", label="peers")
        axes.plot(*_columns(ours), "s-", color="#c0392b", label="memopt (Inductor)")
        axes.set(xlabel="peak over what is resident, MiB", ylabel="seconds a step", title=title)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def _point(row: Row) -> tuple[float, float]:
    return row["transient"] / MIB, seconds(row)


def _columns(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    points = [_point(row) for row in rows]
    return [x for x, _ in points], [y for _, y in points]
