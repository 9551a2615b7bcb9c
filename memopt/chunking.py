"""In how many chunks each step that streams runs: in as few as there is room for where it stands.

A plan is made with one number of chunks for all of them. What a chunk holds is there while its step runs, and at no
other moment, so each step's own number can be chosen by itself, and the fewest is the fastest: weights are read, and
their gradients' sums written, once a chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from memopt.compose import without_outputs
from memopt.facts import facts
from memopt.fusion import Fences
from memopt.graph import StepGraph
from memopt.planned import Planned
from memopt.program import Program
from memopt.streamed import STREAMED, STREAMED_BACKWARD
from memopt.streams import renumbered, streamed_nodes
from memopt.timeline import peak, phase_peaks, rounded, timeline

FEWER = (1, 2, 4, 8, 16, 32)  # numbers that are tried
Number = tuple[int, int]  # chunks, and the bytes that a step takes inside with so many


def widened(planned: Planned, programs: Sequence[Program]) -> Planned:
    """The plan with each step in as few chunks as its budget has room for. programs: of the step's runs, in order."""
    if planned.result.infeasible or not planned.chunks:
        return planned
    found: dict[str, Number] = {}
    for place, program in enumerate(programs):
        found |= _fewest(planned, planned.applied(program, planned.remakes(place), Fences.FREE))
    if not found:
        return planned
    numbers = {name: number for name, (number, _) in found.items()}
    after = _taking(planned.result.after, {name: inside for name, (_, inside) in found.items()})
    made = replace(planned, numbers=numbers, result=replace(planned.result, after=after))
    told = ", ".join(f"{count} steps in {number}" for number, count in sorted(Counter(numbers.values()).items()))
    return _counted(made).noted(f"streams in {planned.chunks} chunks, and where there is room in fewer: {told}")


def _fewest(planned: Planned, program: Program) -> dict[str, Number]:
    """Step -> its number of chunks, of those that fewer than the plan's do for."""
    graph, block, budget = planned.running, planned.problem.block, planned.problem.budget
    line = timeline(graph, block)
    room = {}
    for name in (program.name(node) for node in streamed_nodes(program) if not _draws(node)):
        place = graph.position[name]
        room[name] = budget - line[place] + rounded(graph.steps[place].workspace, block)
    found: dict[str, Number] = {}
    for number in (number for number in FEWER if number < planned.chunks and room):
        twin = renumbered(program, dict.fromkeys(room, number))
        for node in streamed_nodes(twin):
            name, inside = program.name(node), facts(node).workspace
            if name in room and name not in found and rounded(inside, block) <= room[name]:
                found[name] = number, inside
    return found


def _draws(node: fx.Node) -> bool:
    """Random numbers, chunk by chunk: in the backward the same as in the forward."""
    return node.target in (STREAMED, STREAMED_BACKWARD) and node.args[-3] is not None


def _taking(graph: StepGraph, inside: Mapping[str, int]) -> StepGraph:
    """The graph whose steps take so many bytes inside."""
    return replace(graph, steps=tuple(replace(s, workspace=inside.get(s.name, s.workspace)) for s in graph.steps))


def _counted(planned: Planned) -> Planned:
    """The plan with the peaks of its step as it runs now."""
    running, block = planned.running, planned.problem.block
    plan = replace(planned.result.plan, peak=peak(running, block))
    lowered, released = (
        phase_peaks(graph, block) if planned.result.lowered else {} for graph in (running, without_outputs(running))
    )
    return replace(planned, result=replace(planned.result, plan=plan, lowered=lowered), lowered_released=released)
