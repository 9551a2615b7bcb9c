"""What a plan says of itself beside its figures."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from memopt.capture import Survey
from memopt.devices import Device
from memopt.errors import Binding
from memopt.graph import Step, StepGraph
from memopt.joints import Part
from memopt.local import apart, local, padding
from memopt.optim.photograph import OptimizerPhase
from memopt.optim.portions import Update
from memopt.request import Request
from memopt.rewrites import left_alone
from memopt.runtime.rows import GATHER_ROWS, MEAN_ROWS, MESHES
from memopt.seams import runs_untraced
from memopt.timeline import at_peak, by_kind
from memopt.trained import said
from memopt.units import format_size


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


def sharing(model: nn.Module, graph: StepGraph) -> tuple[str, ...]:
    """What a rank has of parameters that fully_shard has sharded, and sends in this step, by ring algorithms."""
    sharded = [p for p in model.parameters() if apart(p)]
    if not sharded:
        return ()
    here, whole = sum(local(p).nbytes + padding(p) for p in sharded), sum(p.numel() * p.itemsize for p in sharded)
    gathers = [step for step in graph.steps if step.op == str(GATHER_ROWS)]
    means = [step for step in graph.steps if step.op == str(MEAN_ROWS)]
    sent = sum(_whole(graph, step) - _own(graph, step) for step in (*gathers, *means))
    for step in means:
        copies = next(mesh.copies for name, mesh in MESHES.items() if f" {name}," in step.key)
        sent += 2 * _own(graph, step) * (copies - 1) // copies
    again = len(gathers) - len({step.reads for step in gathers})
    return (
        f"parameters are sharded by fully_shard: {format_size(here)} of {format_size(whole)} on this rank, their "
        f"gradients too; {len(gathers)} times a parameter is gathered, {again} of them again for the backward; a rank "
        f"sends {format_size(sent)} a step",
    )


def _whole(graph: StepGraph, step: Step) -> int:
    return max(graph.storages[graph.tensors[name].storage].nbytes for name in (*step.reads, *step.writes))


def _own(graph: StepGraph, step: Step) -> int:
    return min(graph.storages[graph.tensors[name].storage].nbytes for name in (*step.reads, *step.writes))


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
