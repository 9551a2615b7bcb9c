"""The memory of one step over its time as an SVG: stacked by what is held, phases shaded, budget and peak marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from memopt.graph import PHASES, Step, StepGraph
from memopt.timeline import lifetimes, rounded
from memopt.units import format_size

# From the bottom up: what never changes first, so that the moving part is on top.
BANDS = ("parameters", "optimizer state", "inputs", "gradients", "activations", "temporaries")
BAND_OF = {
    "parameter": 0, "buffer": 0, "state": 1, "input": 2, "rng": 2, "gradient": 3, "activation": 4, "temporary": 5,
}  # fmt: skip

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 250, 64, 10, 24, 22
COLUMNS = 480  # a column is about two pixels; each shows the highest of its steps, so no peak is lost


def bands(graph: StepGraph, block: int = 1) -> list[list[int]]:
    """Bytes held while each step runs, one list a band of `BANDS`; they add up to `timeline(graph, block)`."""
    delta = [[0] * (len(graph.steps) + 2) for _ in BANDS]
    for name, (born, dead) in lifetimes(graph).items():
        storage = graph.storages[name]
        band, size = delta[BAND_OF.get(storage.kind, 4)], rounded(storage.nbytes, block)
        band[max(born, 0)] += size
        band[min(dead, len(graph.steps)) + 1] -= size
    for at, step in enumerate(graph.steps):
        work = rounded(step.workspace, block)
        delta[-1][at] += work
        delta[-1][at + 1] -= work
    return [_running(band, len(graph.steps)) for band in delta]


def _running(delta: Sequence[int], count: int) -> list[int]:
    held, out = 0, []
    for change in delta[:count]:
        held += change
        out.append(held)
    return out


@dataclass(frozen=True, slots=True)
class Column:
    """Consecutive steps drawn as one: from start to end seconds, at the step that holds most. held: bytes a band."""

    start: float
    end: float
    step: int
    held: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.held)


def columns(graph: StepGraph, seconds: Callable[[Step], float], block: int = 1) -> tuple[Column, ...]:
    """At most `COLUMNS` columns, none across two phases."""
    stacked, spans = bands(graph, block), _spans(graph, seconds)
    size = max(1, math.ceil(len(graph.steps) / (COLUMNS - len(PHASES))))
    out = []
    for first, last in _groups(graph, size):
        top = max(range(first, last), key=lambda at: sum(band[at] for band in stacked))
        out.append(Column(spans[first][0], spans[last - 1][1], top, tuple(band[top] for band in stacked)))
    return tuple(out)


def _groups(graph: StepGraph, size: int) -> Iterator[tuple[int, int]]:
    first = 0
    for at in range(1, len(graph.steps) + 1):
        ends = at == len(graph.steps) or graph.steps[at].phase != graph.steps[first].phase
        if ends or at - first == size:
            yield first, at
            first = at


def _spans(graph: StepGraph, seconds: Callable[[Step], float]) -> list[tuple[float, float]]:
    """Start and end of each step, seconds. Free ones (views) get a sliver, all together at most 2 % of the whole."""
    prices = [max(0.0, seconds(step)) for step in graph.steps]
    least = 0.02 * sum(prices) / max(len(prices), 1) or 1.0
    clock, out = 0.0, []
    for price in prices:
        out.append((clock, clock + max(price, least)))
        clock = out[-1][1]
    return out


@dataclass(frozen=True)
class Scale:
    """Seconds and bytes to picture coordinates; both panels of a page share one."""

    seconds: float
    bytes: int

    def x(self, seconds: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * seconds / (self.seconds or 1.0), 1)

    def y(self, nbytes: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * nbytes / (self.bytes or 1), 1)


def ticks(top: int) -> list[int]:
    """Round numbers of bytes from 0 to at most `top`: 1, 2 or 5 times a power of ten, three to seven of them."""
    power = 10 ** math.floor(math.log10(max(top, 10) / 3))
    step = next((m * power for m in (1, 2, 5) if top / (m * power) <= 6), 10 * power)
    return list(range(0, top + 1, int(step)))


def panel(
    graph: StepGraph, drawn: Sequence[Column], scale: Scale, budget: int, label: str, measured: Mapping[str, int]
) -> str:
    """One SVG: axes, phases, bands, budget, peak. label: what a screen reader says. measured: phase -> peak bytes."""
    spans = phase_spans(graph, drawn)
    under = [*_phases(spans, scale), *_axis(scale), *_areas(drawn, scale)]
    parts = [*under, *_measured(spans, scale, measured), *_marks(drawn, scale, budget)]
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" class="timeline">'
    return "\n".join([head, *parts, '<line class="cursor" y1="0" y2="0" x1="0" x2="0"/>', "</svg>"])


def phase_spans(graph: StepGraph, drawn: Sequence[Column]) -> dict[str, tuple[float, float]]:
    """Phase -> its first and last second in the picture; phases without steps are left out."""
    spans: dict[str, tuple[float, float]] = {}
    for column in drawn:
        phase = graph.steps[column.step].phase
        spans[phase] = (spans.get(phase, (column.start, 0.0))[0], column.end)
    return spans


def _phases(spans: Mapping[str, tuple[float, float]], scale: Scale) -> Iterator[str]:
    top, height = TOP, HEIGHT - TOP - BOTTOM
    for phase, (start, end) in spans.items():
        left, right = scale.x(start), scale.x(end)
        width = round(max(right - left, 0.5), 1)
        yield f'<rect class="phase {phase}" x="{left}" y="{top}" width="{width}" height="{height}"/>'
        if width > 6 * len(phase):  # about the width of the word
            yield f'<text class="phase-name" x="{round((left + right) / 2, 1)}" y="{HEIGHT - 6}">{phase}</text>'
        elif phase == PHASES[-1]:  # a quick optimizer is a sliver: its name ends where it does
            yield f'<text class="phase-name last" x="{right}" y="{HEIGHT - 6}">{phase}</text>'


def _measured(spans: Mapping[str, tuple[float, float]], scale: Scale, measured: Mapping[str, int]) -> Iterator[str]:
    """A line across each phase at the peak measured in it."""
    for phase, size in measured.items():
        if phase in spans and size <= scale.bytes:
            left, right, y = *(scale.x(second) for second in spans[phase]), scale.y(size)
            yield f'<line class="measured" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'


def _axis(scale: Scale) -> Iterator[str]:
    for tick in ticks(scale.bytes):
        y = scale.y(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{y + 3}">{axis_size(tick)}</text>'


def axis_size(nbytes: int) -> str:
    """Decimal unit alone, no needless zeros: "20 GB", "2.5 GB"."""
    number, unit = format_size(nbytes).split(" (")[0].split(" ")
    return f"{float(number):g} {unit}"


def _areas(drawn: Sequence[Column], scale: Scale) -> Iterator[str]:
    """A closed path a band: along its top from left to right, back along the band below."""
    below = [0] * len(drawn)
    for number in range(len(BANDS)):
        above = [low + column.held[number] for low, column in zip(below, drawn, strict=True)]
        if above != below:
            there = _stairs(drawn, above, scale)
            back = list(reversed(_stairs(drawn, below, scale)))
            yield f'<path class="band b{number}" d="M{" ".join((*there, *back))}Z"/>'
        below = above


def _stairs(drawn: Sequence[Column], heights: Sequence[int], scale: Scale) -> list[str]:
    points = []
    for column, height in zip(drawn, heights, strict=True):
        y = scale.y(height)
        points += [f"{scale.x(column.start):g},{y:g}", f"{scale.x(column.end):g},{y:g}"]
    return points


def _marks(drawn: Sequence[Column], scale: Scale, budget: int) -> Iterator[str]:
    """The budget, if it lies within the picture, and the peak."""
    if budget <= scale.bytes:
        y = scale.y(budget)
        yield f'<line class="budget" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="budget-name" x="{LEFT + 4}" y="{y - 4}">budget {axis_size(budget)}</text>'
    if not drawn:
        return
    top = max(drawn, key=lambda column: column.total)
    x, y = scale.x((top.start + top.end) / 2), scale.y(top.total)
    over = " over" if top.total > budget else ""
    side = "end" if x > WIDTH * 0.8 else "start"
    place = f'x="{x + (-8 if side == "end" else 8)}" y="{y - 6}" text-anchor="{side}"'
    yield f'<circle class="peak{over}" cx="{x}" cy="{y}" r="4"/>'
    yield f'<text class="peak-name{over}" {place}>peak {axis_size(top.total)}</text>'
