"""The report as one offline page: nothing is loaded from anywhere, so it opens from a mail or a share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape

from memopt.chart import BANDS, Column, Scale, axis_size, columns, panel
from memopt.graph import StepGraph, plain_name
from memopt.page import SCRIPT, STYLE
from memopt.report import PlanResult, held
from memopt.table import bound_line, needed, percent, place_of_peak, short, verdict, way_cells
from memopt.timeline import at_peak, by_kind, phase_peaks
from memopt.units import format_seconds, format_size

PLANNED = "With the plan"
ROWS = 500  # of the decisions; a page of thousands of rows helps nobody, the JSON has them all
LINES = 40  # source lines listed at the peak
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def to_html(result: PlanResult) -> str:
    """The whole page."""
    title = f"memopt: {result.model} on {result.device}"
    body = "\n".join(_body(result))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def _body(result: PlanResult) -> Iterator[str]:
    bad = result.infeasible or result.held is False
    yield f"<h1>{escape(result.model)} <span class=soft>on {escape(result.device)}</span></h1>"
    yield f'<p class="{"bad" if bad else "good"}">{escape(_sentence(result))}</p>'
    yield f'<div class="cards">{"".join(_cards(result))}</div>'
    if result.infeasible:
        yield _section("Ways out", _floor(result) + _ways(result))
    if result.before.steps:
        yield _section("Memory over the step", _charts(result))
        yield _section("What lives at the peak", _at_peak(result))
    yield _section("Phases", _phases(result))
    if result.levers:
        yield _section("What memopt does", _levers(result))
        yield _section(f"Decisions ({len(result.decisions)})", _decisions(result))
    yield _section("How it was found", _facts(result))


def _sentence(result: PlanResult) -> str:
    if result.measured is None:
        return verdict(result)
    word, size = "held" if result.held else "over the budget", format_size(result.measured.peak_bytes)
    return f"{word}: measured {size}, {100 * (result.error or 0):+.2f} % against the plan"


def _cards(result: PlanResult) -> Iterator[str]:
    old, new = result.baseline_peak, result.peak
    yield _card("budget", short(result.budget), format_size(result.budget))
    if result.infeasible:
        word, meaning = needed(result)
        yield _card(word, short(result.plan.peak), meaning)
        yield _card("peak without memopt", short(old), format_size(old))
        return
    yield _card("predicted peak", short(new), f"{percent(new - old, old, '+')} from {short(old)} without memopt")
    if measured := result.measured:
        yield _card("measured peak", short(measured.peak_bytes), f"{100 * (result.error or 0):+.2f} % from predicted")
        yield _card("measured step", format_seconds(measured.seconds), "wall clock of one step")
    slower = percent(result.step_seconds - result.baseline_seconds, result.baseline_seconds, "+")
    old_seconds = format_seconds(result.baseline_seconds)
    yield _card("predicted step", format_seconds(result.step_seconds), f"{slower} from {old_seconds} without memopt")
    yield _card("gap", f"{100 * result.gap:.2f} %", "of the step time, to the proven lower bound")


def _card(name: str, value: str, under: str) -> str:
    return f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(under)}</span></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _charts(result: PlanResult) -> str:
    """Two panels on one scale of bytes and seconds, so that they can be compared by eye."""
    shown = [("Without memopt", result.baseline)] * (result.after is not result.baseline or result.infeasible)
    shown += [(PLANNED, result.after)] * (not result.infeasible)
    spent = {PLANNED: result.seconds_of}
    drawn = [columns(graph, spent.get(name, result.baseline_seconds_of), result.block) for name, graph in shown]
    top = max(column.total for panel_columns in drawn for column in panel_columns)
    found = result.measured.phases if result.measured else {}
    top = max(top, *found.values(), 0)
    top = max(top, result.budget) if result.budget < 2 * top else top  # a far budget would flatten the picture
    scale = Scale(max(panel_columns[-1].end for panel_columns in drawn), int(top * 1.08))
    parts = [
        f"<h3>{name}</h3>" + _chart(graph, mine, scale, result.budget, name, found if name == PLANNED else {})
        for (name, graph), mine in zip(shown, drawn, strict=True)
    ]
    note = "Across: predicted seconds of the step. Up: bytes held while each operation runs."
    return "".join(parts) + _legend(bool(found)) + f'<p class="soft">{note}</p>'


def _chart(
    graph: StepGraph, drawn: tuple[Column, ...], scale: Scale, budget: int, name: str, measured: Mapping[str, int]
) -> str:
    picture = panel(graph, drawn, scale, budget, f"{name}: bytes held over the step", measured)
    data = json.dumps([_point(graph, column, scale) for column in drawn], separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # a name holding "</script>" must not end the script
    return f'<div class="chart">{picture}<div class="tip"></div><script type="application/json">{data}</script></div>'


def _point(graph: StepGraph, column: Column, scale: Scale) -> list[object]:
    step = graph.steps[column.step]
    lines = [f"{axis_size(size)} {band}" for band, size in zip(BANDS, column.held, strict=True) if size]
    title = f"{step.phase}, {step.op}, step {column.step + 1}"
    return [scale.x(column.start), scale.x(column.end), title, step.source, format_size(column.total), lines[::-1]]


def _legend(measured: bool) -> str:
    names = [(f"b{n}", band) for n, band in enumerate(BANDS)] + [("found", "measured peak")] * measured
    items = "".join(f'<span><i class="{kind}"></i>{name}</span>' for kind, name in names)
    return f'<div class="legend">{items}</div>'


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """heads ending in '>' are figures, in '%' bars (cells: a share of 1 as text), in '.' names. Cells are escaped."""
    heads = tuple(heads)
    kinds = [{">": "num", "%": "share", ".": "name"}.get(head[-1:], "") for head in heads]
    top = "".join(
        f'<th class="{kind}">{escape(head.rstrip(">%."))}</th>' for head, kind in zip(heads, kinds, strict=True)
    )
    body = "".join(f"<tr>{''.join(_cell(*pair) for pair in zip(kinds, cells, strict=True))}</tr>" for cells in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(kind: str, text: str) -> str:
    if kind == "share":
        return f'<td class="share"><span class="bar" style="width:{100 * float(text):.1f}%"></span></td>'
    return f'<td class="{kind}">{escape(text)}</td>'


def _at_peak(result: PlanResult) -> str:
    """By kind and by source line, with the plan; the same without it, folded away."""
    now = f'<p class="soft">{escape(place_of_peak(result))}</p>' + _held(result, result.after)
    if result.infeasible or result.after is result.baseline:
        return now
    return f"{now}<details><summary>The same without memopt</summary>{_held(result, result.baseline)}</details>"


def _held(result: PlanResult, graph: StepGraph) -> str:
    snapshot = at_peak(graph, result.block)
    whole = max(snapshot.bytes, 1)
    kinds = by_kind(graph, snapshot).items()
    first = _table(
        ("kind", "bytes>", "share>", "%"), ((k, short(n), percent(n, whole), str(n / whole)) for k, n in kinds)
    )
    lines = held(graph, snapshot)
    rows = [
        (
            h.source or "before the step",
            h.kind,
            str(h.count),
            short(h.bytes),
            str(h.bytes / whole),
            plain_name(h.largest),
        )
        for h in lines[:LINES]
    ]
    if rest := lines[LINES:]:
        size = sum(h.bytes for h in rest)
        rows.append(("elsewhere", "", str(sum(h.count for h in rest)), short(size), str(size / whole), ""))
    heads = ("made at", "kind", "storages>", "bytes>", "%", "the largest of them.")
    return first + "<h3>By source line</h3>" + _table(heads, rows)


def _phases(result: PlanResult) -> str:
    before, after = phase_peaks(result.baseline, result.block), phase_peaks(result.after, result.block)
    shown: dict[str, dict[str, str]] = {"peak without memopt>": {name: short(size) for name, size in before.items()}}
    if not result.infeasible:
        shown["planned>"] = {name: short(size) for name, size in after.items()}
        shown["change>"] = {name: percent(after.get(name, 0) - old, old, "+") for name, old in before.items()}
    if result.measured:
        shown["measured>"] = {name: short(size) for name, size in result.measured.phases.items()}
    rows = ((name, *(column.get(name, "") for column in shown.values())) for name in before)
    return _table(("phase", *shown), rows)


def _levers(result: PlanResult) -> str:
    rows = ((v.lever, v.numerics, str(v.count), short(v.bytes), format_seconds(v.seconds)) for v in result.levers)
    return _table(("lever", "numerics", "values>", "bytes let go>", "seconds a step>"), rows)


def _decisions(result: PlanResult) -> str:
    ranked = sorted(result.decisions, key=lambda d: (-d.bytes, d.value))
    rows = ((d.value, d.lever, short(d.bytes), format_seconds(d.seconds), d.source) for d in ranked[:ROWS])
    table = _table(("value.", "lever", "bytes>", "seconds>", "source"), rows)
    more = len(ranked) - ROWS
    return table + (f'<p class="soft">and {more} smaller ones; --json lists all</p>' if more > 0 else "")


def _floor(result: PlanResult) -> str:
    lines = [f"{needed(result)[1].capitalize()}: {format_size(result.plan.peak)}."]
    if binding := result.binding:
        lines.append("Set by " + ", ".join(word for word in (binding.step, binding.op, binding.source) if word) + ".")
        lines.append("Made of " + ", ".join(f"{kind} {short(size)}" for kind, size in binding.kinds) + ".")
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _ways(result: PlanResult) -> str:
    heads = ("change.", "numerics", "peak>", "seconds added>", "budget")
    return _table(heads, map(way_cells, result.ways_out)) if result.ways_out else ""


def _facts(result: PlanResult) -> str:
    rows = [] if result.infeasible else [("proof", bound_line(result))]
    if result.formula:
        rows.append(("peak(B, S)", f"{result.formula} bytes, under these decisions"))
    rows.append(("graph", f"{len(result.before.steps)} steps, graph breaks: {result.breaks}"))
    rows += [(f"seconds to {name}", format_seconds(seconds)) for name, seconds in result.timings.items()]
    rows += [("note", note) for note in result.remarks]
    rows += [(name, value) for name, value in result.identity.items()]
    return _table(("", ""), rows)
