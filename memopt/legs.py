"""Inductor's code of the step's programs, rehearsed (memopt/runtime/rehearse.py) for the bytes it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from memopt.compose import LET_GO, without_outputs
from memopt.edit import edit
from memopt.fusion import Fences
from memopt.graph import StepGraph
from memopt.inductor import Half, generate
from memopt.joints import Part
from memopt.planned import Planned
from memopt.plans import Plan
from memopt.profiling import SECONDS
from memopt.program import Program, split
from memopt.relay import Leg, rehearsed
from memopt.runtime import rows
from memopt.runtime.opcost import OpCosts
from memopt.runtime.rehearse import Workspace, nothing
from memopt.timeline import phase_peaks, rounded
from memopt.tuning import tuned

Run = tuple[Program, Part]  # one run of a graph: its program, and what it passes to the others


def tuned_code(
    planned: Planned, runs: Sequence[Run], time_limit: float, kind: str = "cpu", search: bool = True
) -> Planned:
    """The plan whose code, as Inductor makes it of the programs, holds the budget (`memopt.tuning.tuned`).

    runs: the programs of the step in the order they run. kind: of device, where library calls are tried for what they
    need.
    """
    with OpCosts(kind, seconds_limit=SECONDS) as meter:
        needs = partial(_workspace, meter)
        return tuned(planned, lambda p, f: lowered_phases(planned, runs, p, f, needs), time_limit, search)


def _workspace(meter: OpCosts, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """What a library call needs inside itself: tried, unless other ranks take part in it."""
    known = rows.workspace(op, args)
    return meter.workspace(op, args, kwargs) if known is None else known


def lowered_phases(
    planned: Planned, legs: Sequence[Run], plan: Plan, fences: Fences, needs: Workspace = nothing
) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes of each phase when the programs with this plan run as Inductor's code.

    Twice: when the caller holds the outputs beside the loss through the backward, and when it has let them go.
    """
    graph = planned.whole
    edited, block = edit(planned.problem.graph, plan.chosen), planned.problem.block
    static = sum(rounded(graph.storages[name].nbytes, block) for name in graph.input_storages)
    made = compiled_legs(replace(planned, result=replace(planned.result, plan=plan)), legs, fences)

    def phases(whole: StepGraph, after: StepGraph) -> dict[str, int]:
        peaks = rehearsed(made, frozenset(whole.outputs), _seeds(whole), needs, block)
        return phase_peaks(after, block) | {"forward": static + peaks[0], "backward": static + peaks[1]}

    return phases(graph, edited), phases(without_outputs(graph), without_outputs(edited))


def compiled_legs(planned: Planned, runs: Sequence[Run], fences: Fences) -> tuple[Leg, ...]:
    """Inductor's code of every run; runs of one graph whose decisions are the same share it."""
    known: dict[Any, tuple[Half, Half | None]] = {}
    made = []
    for place, (program, part) in enumerate(runs):
        key = planned.signatures[place], planned.decisions(place) if fences is Fences.FREE else place
        if key not in known:
            changed = planned.applied(program, planned.remakes(place), fences)
            known[key] = _halves(changed, _ownership(planned.whole, changed, part))
        made.append(Leg(part, *known[key]))
    return tuple(made)


def _halves(program: Program, mine: Callable[[str], bool]) -> tuple[Half, Half | None]:
    if not program.outputs[1]:
        return generate(program.module, False, program.forward_outputs, mine), None
    forward, backward = split(program)
    first = generate(forward, False, program.forward_outputs, mine)
    return first, generate(backward, True, 0, mine, first.strides)


def _seeds(graph: StepGraph) -> frozenset[str]:
    """Gradients of outputs that the caller holds through the backward."""
    return frozenset(name for step in graph.steps if step.op == LET_GO for name in step.reads)


def _ownership(graph: StepGraph, program: Program, part: Part) -> Callable[[str], bool]:
    """Whether an input of a half, by name, is the step's to free or write into: no parameter, input or output."""
    seeds = _seeds(graph)
    outputs = (program.name(node) for node in program.outputs[0] if node is not None)
    own = part.graph
    others = {*own.input_storages, *(own.storage_of(name) for name in outputs if name in own.outputs)}

    def mine(name: str) -> bool:
        tensor = program.prefix + name
        if name in program.kinds:
            return program.kinds[name] == "tangent" and tensor not in seeds
        return tensor not in own.tensors or own.storage_of(tensor) not in others

    return mine
