"""The report as text: one rich renderable, readable on a terminal, without colour and in a pipe."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from memopt.graph import PHASES, plain_name
from memopt.timeline import by_kind, phase_peaks
from memopt.units import format_seconds, format_size

if TYPE_CHECKING:
    from memopt.errors import WayOut
    from memopt.planfile import PlanDiff, PlanFile
    from memopt.report import PlanResult

LARGEST = 8  # source lines listed at the peak
WIDTH = 120  # columns where the terminal does not say


def short(nbytes: int) -> str:
    """Decimal unit alone ("24.00 GB"), for columns; the headline prints both."""
    return format_size(nbytes).split(" (")[0]


def percent(part: float, whole: float, sign: str = "") -> str:
    """part as a share of whole, "12.3 %"; sign="+" prints plus signs; "-" if there is no whole."""
    return f"{100 * part / whole:{sign}.1f} %" if whole else "-"


def row(table: Table, *cells: str | Text) -> None:
    """Add a row of plain text: names, sources and notes are shown as they are, never read as rich markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def heading(text: str) -> Text:
    """Apart from its table, as rich would wrap a table's title to the table's width."""
    return Text(f"\n{text}", style="bold")


def grid(*columns: str) -> Table:
    """An empty table; columns whose head ends in '>' are right-aligned figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return table


def render(result: PlanResult) -> RenderableType:
    """The whole report; print it with a rich Console."""
    return Group(*_parts(result))


def to_text(result: PlanResult, width: int = WIDTH) -> str:
    """The report as plain text, no escape codes, `width` columns."""
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, force_terminal=False).print(render(result))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _parts(result: PlanResult) -> Iterator[RenderableType]:
    yield _headline(result)
    yield _totals(result)
    if result.infeasible:
        yield from _ways_out(result)
    if result.after.steps:
        yield heading(f"Held at the peak ({place_of_peak(result)})")
        yield _at_peak(result)
        yield _largest(result)
    if result.levers:
        yield heading("What memopt does")
        yield _levers(result)
    yield _lines(result)


VERDICTS = {
    "fits": "fits as it is: nothing had to be done",
    "optimal": "planned: holds the budget, proven the fastest within the gap below",
    "feasible": "planned: holds the budget; how far from the fastest it can be is the gap below",
    "infeasible": "infeasible: no choice of the levers allowed holds this budget; nothing was allocated",
}
REFUSED_AGAIN = "infeasible: the saved plan's decisions do not hold this budget; nothing was allocated"


def verdict(result: PlanResult) -> str:
    """The status in a sentence."""
    return REFUSED_AGAIN if result.infeasible and result.reused else VERDICTS[result.plan.status.value]


def needed(result: PlanResult) -> tuple[str, str]:
    """Of a refusal: what its bytes are called, and what they are."""
    if result.reused:
        return "needed", "what the saved plan's decisions take; planning anew may take less"
    return "floor", "the least this step can run in"


def _headline(result: PlanResult) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    row(table, Text("memopt", style="bold"), Text(f"{result.model} on {result.device}", style="bold"))
    row(table, "budget", format_size(result.budget))
    row(table, "status", Text(verdict(result), style="red" if result.infeasible else "green"))
    if result.measured is not None:
        row(table, "measured", _verdict(result))
    return table


def _verdict(result: PlanResult) -> Text:
    assert result.measured is not None
    top, error = result.measured.peak_bytes, result.error or 0.0
    room = result.budget - top
    word = f"held, {short(room)} to spare" if result.held else f"OVER the budget by {short(-room)}"
    text = f"{format_size(top)}: {word}; {100 * error:+.2f} % against the prediction"
    return Text(text, style="green" if result.held else "bold red")


TIME = "step time"


def _totals(result: PlanResult) -> Table:
    """Peak, phase peaks and step time: without memopt, planned and the change, measured where there is a figure."""
    before = _figures(result.baseline_peak, phase_peaks(result.baseline, result.block), result.baseline_seconds)
    columns = {"without memopt>": {name: _figure(name, value) for name, value in before.items()}}
    if not result.infeasible:
        after = _figures(result.peak, phase_peaks(result.after, result.block), result.step_seconds)
        columns["planned>"] = {name: _figure(name, value) for name, value in after.items()}
        both = {
            name: old for name, old in before.items() if name in after
        }  # a plan may have no step of its own to update
        columns["change>"] = {name: percent(after[name] - old, old, "+") for name, old in both.items()}
    if found := result.measured:
        figures = _figures(found.peak_bytes, found.phases, found.seconds)
        columns["measured>"] = {name: _figure(name, value) for name, value in figures.items()}
    table = grid("", *columns)
    for name in before:
        row(table, name, *(column.get(name, "") for column in columns.values()))
    return table


def _figures(top: int, phases: Mapping[str, int], seconds: float) -> dict[str, float]:
    return {"peak": top, **{f"  {phase}": phases[phase] for phase in PHASES if phase in phases}, TIME: seconds}


def _figure(name: str, value: float) -> str:
    return format_seconds(value) if name == TIME else short(int(value))


def place_of_peak(result: PlanResult) -> str:
    """Phase, operation, number and source line of the step at which the peak is first reached."""
    at, steps = result.snapshot.position, result.after.steps
    words = (steps[at].phase, steps[at].op, f"step {at + 1} of {len(steps)}", steps[at].source)
    return ", ".join(word for word in words if word)


def _at_peak(result: PlanResult) -> Table:
    snapshot = result.snapshot
    table = grid("kind", "bytes>", "share>")
    for kind, size in by_kind(result.after, snapshot).items():
        row(table, kind, short(size), percent(size, snapshot.bytes))
    return table


def _largest(result: PlanResult) -> Table:
    table = grid("made at", "kind", "storages>", "bytes>", "the largest of them")
    for held in result.held_at_peak[:LARGEST]:
        size = short(result.after.storages[held.largest].nbytes)
        line = held.source or "before the step"
        row(table, line, held.kind, str(held.count), short(held.bytes), f"{plain_name(held.largest)} {size}")
    if rest := result.held_at_peak[LARGEST:]:
        count = sum(held.count for held in rest)
        row(table, "elsewhere", "", str(count), short(sum(held.bytes for held in rest)), "")
    return table


def _levers(result: PlanResult) -> Table:
    table = grid("lever", "numerics", "values>", "bytes let go>", "seconds a step>")
    for lever in result.levers:
        spent = format_seconds(lever.seconds)
        row(table, lever.lever, lever.numerics, str(lever.count), short(lever.bytes), spent)
    return table


def _ways_out(result: PlanResult) -> Iterator[RenderableType]:
    facts = Table.grid(padding=(0, 2))
    word, meaning = needed(result)
    row(facts, word, f"{format_size(result.plan.peak)}: {meaning}")
    if binding := result.binding:
        row(facts, "set by", ", ".join(word for word in (binding.step, binding.op, binding.source) if word))
        row(facts, "made of", ", ".join(f"{kind} {short(size)}" for kind, size in binding.kinds))
    yield facts
    if result.ways_out:
        yield heading("Ways out")
        table = grid("change", "numerics", "peak>", "seconds added>", "budget")
        for way in result.ways_out:
            row(table, *way_cells(way))
        yield table


def way_cells(way: WayOut) -> tuple[str, ...]:
    """A way out as the cells of its row; the last says whether it is enough."""
    enough = "fits" if way.fits else "still over"
    return way.change, way.numerics, short(way.peak_bytes), format_seconds(way.seconds), enough


def _lines(result: PlanResult) -> Table:
    """What is one line each: the proof, the formula, the graph, timings, notes."""
    table = Table.grid(padding=(0, 2))
    if not result.infeasible:
        row(table, "proof", bound_line(result))
    if result.formula:
        row(table, "peak(B, S)", f"{result.formula}  bytes, under these decisions")
    counts = f"{len(result.before.steps)} steps, graph breaks: {result.breaks}"
    row(table, "graph", counts)
    if result.timings:
        row(table, "took", ", ".join(f"{name} {format_seconds(s)}" for name, s in result.timings.items() if s))
    for note in result.remarks:
        row(table, "note", note)
    return table


def bound_line(result: PlanResult) -> str:
    """The certificate in a sentence: the least seconds any plan could take, and how far this one is from it."""
    plan = result.plan
    if plan.seconds <= 0:
        return "no seconds added, which nothing can beat"
    bound = format_seconds(result.bound_seconds)
    return (
        f"{format_seconds(plan.seconds)} added; no plan of these levers takes under {bound} a step; "
        f"gap {100 * result.gap:.2f} % of the step time ({plan.solver or 'unnamed solver'})"
    )


def render_plan_file(plan: PlanFile) -> RenderableType:
    """A saved plan: what it promises, and its decisions, most bytes first."""
    from memopt.planfile import brief  # here, because the report itself needs no plan files

    head = Table.grid(padding=(0, 2))
    row(head, Text("plan", style="bold"), Text(f"{plan.model} on {plan.device}", style="bold"))
    row(head, "budget", format_size(plan.budget))
    row(head, "peak", f"{format_size(plan.peak)}; {short(plan.baseline_peak)} without memopt")
    row(head, "step time", f"{format_seconds(plan.seconds)}; {format_seconds(plan.baseline_seconds)} without memopt")
    versions = f"memopt {plan.memopt}, torch {plan.identity.get('torch', '?')}"
    row(head, "made by", f"{versions}, graph {brief(plan.identity.get('graph', '?'))}")
    table = grid("value", "lever", "bytes>", "made again before", "source")
    for remake in sorted(plan.remakes, key=lambda r: (-r.bytes, r.value, r.span)):
        row(table, remake.value, remake.trade, short(remake.bytes), remake.span[0], remake.source)
    return Group(head, heading(f"{len(plan.remakes)} decisions"), table)


def render_diff(diff: PlanDiff) -> RenderableType:
    """What separates two plans."""
    if diff.same:
        return Text(f"the plans are the same ({diff.kept} decisions)")
    parts: list[RenderableType] = []
    if diff.changes:
        changes = grid("changed", "a>", "b>")
        for name, (a, b) in diff.changes.items():
            row(changes, name, *(_value(name, value) for value in (a, b)))
        parts.append(changes)
    decisions = grid("only in", "value", "lever", "bytes>", "source")
    for side, remakes in (("a", diff.removed), ("b", diff.added)):
        for r in remakes:
            row(decisions, side, r.value, r.trade, short(r.bytes), r.source)
    kept = Text(f"{diff.kept} decisions in both")
    return Group(*parts, decisions, kept) if diff.removed or diff.added else Group(*parts, kept)


def _value(name: str, value: object) -> str:
    if isinstance(value, int) and name in ("budget", "peak", "baseline_peak"):
        return format_size(value)
    return format_seconds(value) if isinstance(value, float) else str(value)
