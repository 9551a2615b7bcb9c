"""What a plan says of itself beside its figures."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from memopt.capture import Survey
from memopt.devices import Device
from memopt.errors import Binding
from memopt.graph import StepGraph
from memopt.joints import Part
from memopt.optim.photograph import OptimizerPhase
from memopt.optim.portions import Update
from memopt.request import Request
from memopt.rewrites import left_alone
from memopt.seams import runs_untraced
from memopt.timeline import at_peak, by_kind
from memopt.trained import said


def remarks(
    survey: Survey,
    parts: Sequence[Part],
    phase: OptimizerPhase,
    request: Request,
    update: Update,
) -> tuple[str, ...]:
    """What was assumed, what is not seen, how the optimizer steps."""
    assumed = [phase.assumed] if phase.assumed else []
    notes = [*survey.notes, *left_alone(survey), *assumed, *said(update, request.optimizer, phase)]
    if len(survey.captures) > 1:
        notes.append(f"the model breaks into {len(survey.captures)} graphs; one budget is shared among them")
    if runs_untraced(parts):
        notes.append(
            "between its graphs the model runs untraced operations; what they hold by themselves is not planned"
        )
    return tuple(notes)


def priced_by(graph: StepGraph, measured: Collection[str], device: Device) -> str:
    """Where seconds and workspaces come from: the same step priced otherwise may get another plan."""
    keys = {step.key for step in graph.steps if step.key and graph.created(step) and step.phase != "optimizer"}
    known = len(keys & set(measured))
    if known == len(keys):
        return "seconds and workspaces of operations: measured on this device"
    return (
        f"seconds of operations: {known} of {len(keys)} kinds measured on this device, the others by the roofline of "
        f"{device.name}; what those take inside themselves (workspaces) is not counted"
    )


def binding(graph: StepGraph, block: int) -> Binding:
    """The step that sets the peak of this graph, with its bytes by kind."""
    snapshot = at_peak(graph, block)
    step = graph.steps[snapshot.position]
    return Binding(step.name, step.op, step.source, snapshot.bytes, tuple(by_kind(graph, snapshot).items()))
