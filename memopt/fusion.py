"""The step as a fusing compiler runs it: pointwise and reduction steps between two library calls become one step.

Inside a fused step nothing is stored; only what is read elsewhere is. Planning on the unfused graph would pay, in bytes
and seconds, for temporaries that Inductor never makes. `fused` contracts the graph for the solver, `expanded` turns the
remakes the solver chose back into remakes of the real steps. What the code really holds is rehearsed afterwards
(memopt/tuning.py), so this model steers the choice and decides nothing about the promise.

Assumed: steps that touch the same values and have no library call between them fuse. Left out: values Inductor
recomputes in several kernels, kernels it splits for their size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx

from memopt.cost import moved_bytes
from memopt.edit import Remake
from memopt.graph import Step, StepGraph


@dataclass(frozen=True)
class Fused:
    """graph: contracted. original: before. members: fused step -> the steps inside, in order.

    inside: storage made in a fused step and read nowhere else -> that step.
    """

    graph: StepGraph
    original: StepGraph
    members: Mapping[str, tuple[Step, ...]] = field(repr=False)
    inside: Mapping[str, str] = field(repr=False)


def fused(graph: StepGraph) -> Fused:
    """Contract every group of fusable steps between two library calls that share values."""
    steps: list[Step] = []
    members: dict[str, tuple[Step, ...]] = {}
    for window in _windows(graph):
        for group in _groups(graph, window):
            if any(step.fusable for step in group):
                merged = _merged(graph, group)
                members[merged.name] = tuple(group)
                steps.append(merged)
            else:
                steps.extend(group)
    written = {name for step in steps for name in step.writes}
    inside = {
        graph.storage_of(name): merged
        for merged, group in members.items()
        for step in group
        for name in step.writes
        if name not in written
    }
    return Fused(replace(graph, steps=tuple(steps)), graph, members, inside)


def unfused(graph: StepGraph) -> Fused:
    """The graph as it is, for the eager lowering."""
    return Fused(graph, graph, {}, {})


def _windows(graph: StepGraph) -> Iterable[list[Step]]:
    """Runs of fusable steps of one phase; any other step is a window of its own."""
    run: list[Step] = []
    for step in graph.steps:
        fusable = step.fusable or _view(graph, step)
        if run and (not fusable or run[-1].phase != step.phase):
            yield run
            run = []
        if fusable:
            run.append(step)
        else:
            yield [step]
    if run:
        yield run


def _view(graph: StepGraph, step: Step) -> bool:
    return step.pure and bool(step.writes) and not graph.created(step)


def _groups(graph: StepGraph, window: Sequence[Step]) -> list[list[Step]]:
    """Steps of a window that share values made in it, together; groups in the order of their last step."""
    if len(window) == 1:
        return [list(window)]
    made = {name: at for at, step in enumerate(window) for name in step.writes}
    links: nx.Graph = nx.Graph()
    links.add_nodes_from(range(len(window)))
    for at, step in enumerate(window):
        links.add_edges_from((made[name], at) for name in step.reads if name in made)
    groups = [sorted(part) for part in nx.connected_components(links)]
    return [[window[at] for at in group] for group in sorted(groups, key=lambda group: group[-1])]


def _merged(graph: StepGraph, group: Sequence[Step]) -> Step:
    """One step for the group: reads what comes from outside, writes what is read outside."""
    inner = {name for step in group for name in step.writes}
    names = {step.name for step in group}
    outputs = set(graph.outputs)
    writes = [n for step in group for n in step.writes if n in outputs or _read_outside(graph, n, names)]
    reads = dict.fromkeys(n for step in group for n in step.reads if n not in inner)
    first, last = group[0], group[-1]
    plain = len(group) == 1
    return replace(
        last,
        op=first.op if plain else "fused",
        reads=tuple(reads),
        writes=tuple(writes),
        key=first.key if plain else "+".join(step.key for step in group),
        flops=sum(step.flops for step in group),
        workspace=max(step.workspace for step in group),
        pure=all(step.pure for step in group),
        advances=any(step.advances for step in group),
        fused=True,
    )


def _read_outside(graph: StepGraph, tensor: str, names: set[str]) -> bool:
    return any(graph.steps[at].name not in names for at in graph.readers.get(tensor, ()))


def fused_seconds(found: Fused, seconds: Mapping[str, float]) -> dict[str, float]:
    """Step name -> seconds: a fused step's members cost the share of their bytes that still moves."""
    out = dict(seconds)
    for name, group in found.members.items():
        moved = sum(moved_bytes(found.original, step) for step in group)
        merged = found.graph.steps[found.graph.position[name]]
        still = moved_bytes(found.graph, merged)
        out[name] = sum(seconds.get(step.name, 0.0) for step in group) * min(1.0, still / moved if moved else 0.0)
    return out


def expanded(found: Fused, remakes: Iterable[Remake]) -> tuple[Remake, ...]:
    """The same choice on the original graph: what a fused step makes inside itself is remade along with its outputs."""
    chosen: dict[tuple[str, tuple[str, str]], Remake] = {}
    for remake in remakes:
        for step in remake.unpack:
            group = found.members.get(step.name, ())
            for member in group:
                for value in found.original.created(member):
                    if value == remake.value or found.inside.get(value) == step.name:
                        new = Remake(remake.trade, value, _span(found, remake), (member,))
                        chosen.setdefault((value, new.span), new)
            if not group:
                chosen.setdefault((remake.value, _span(found, remake)), replace(remake, span=_span(found, remake)))
    return tuple(chosen.values())


def _span(found: Fused, remake: Remake) -> tuple[str, str]:
    """The span in original steps: from the first member of its first step to the last of its last."""
    first, last = remake.span
    return (found.members[first][0].name if first in found.members else first), last
