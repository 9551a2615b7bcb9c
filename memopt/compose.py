"""The whole step from its parts: forwards in call order, backwards in reverse, then the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from memopt.graph import Step, StepGraph, Storage, TensorInfo, verify
from memopt.joints import Joiner, Part
from memopt.optim.photograph import OptimizerPhase
from memopt.overlap import MOVE

RETURN = "return"  # the step that hands the forward's outputs to the caller
LET_GO = "let_go"  # the step in which autograd lets go of the loss's gradient, which it holds until the backward ends


def whole_step(parts: Sequence[Part], optimizer: OptimizerPhase, accumulated: bool = False) -> StepGraph:
    """One StepGraph of the step.

    parts: in the order their forwards run. optimizer: its steps read parameters by name and gradients as
    `grad:<name>`; those of its early parameters stand in the backward, and their gradients end there, as do those that
    are moved elsewhere. accumulated: the gradients of earlier micro-batches are alive from the start, and this one's
    are added to them after the backward.
    """
    step = _joined(parts)
    every = {f"grad:{name}": made for name, made in step.gradients().items()}
    own = {name: made for name, made in every.items() if name.removeprefix("grad:") not in optimizer.away}
    tensors, storages = {**optimizer.tensors, **step.tensors}, {**optimizer.storages, **step.storages}
    inputs = {**step.inputs, **dict.fromkeys(name for name in optimizer.given if name not in own)}
    kept = (made for name, made in own.items() if name.removeprefix("grad:") not in optimizer.early)
    outputs = dict.fromkeys([*step.outputs, *kept, *optimizer.outputs])
    moves = {name: (_move(name),) for name in optimizer.away}
    steps = updated(step.steps, tensors, every, {**optimizer.early, **moves})
    if seeds := tuple(name for name in step.seeds if loss_like(tensors[name])):
        steps.append(Step(LET_GO, LET_GO, "backward", seeds, (), pure=False))
    if accumulated:
        for name in [name for name in own if name not in tensors]:  # no optimizer's phase declared them
            _declare(name, tensors[own[name]], tensors, storages)
        steps.append(_accumulate(own, inputs, outputs))
        own = {}
    steps += [_renamed(step, own) for step in optimizer.steps]
    return verify(StepGraph(tuple(inputs), tuple(steps), tuple(outputs), tensors, storages))


def updated(
    steps: Sequence[Step],
    tensors: Mapping[str, TensorInfo],
    own: Mapping[str, str],
    early: Mapping[str, tuple[Step, ...]],
) -> list[Step]:
    """The steps, each early parameter's update behind the last one that touches it or its gradient, which the update
    holds to its end. own: `grad:<parameter>` -> tensor."""
    last = last_uses(steps, tensors) if early else {}
    behind: dict[int, list[Step]] = {}
    for name, update in early.items():
        gradient = own[f"grad:{name}"]
        at = max(last.get(tensors[name].storage, -1), last[tensors[gradient].storage])
        moved = [replace(_renamed(step, own), phase="backward") for step in update]
        moved[-1] = replace(moved[-1], reads=tuple(dict.fromkeys((*moved[-1].reads, gradient))))
        behind.setdefault(at, []).extend(moved)
    return [one for at, step in enumerate(steps) for one in (step, *behind.get(at, ()))]


def _move(name: str) -> Step:
    """What puts a parameter's gradient elsewhere, named as the optimizer's steps are: nothing reads it here again."""
    return Step(f"opt:{MOVE}:{name}", MOVE, "backward", (f"grad:{name}", name), (), pure=False)


def last_uses(steps: Iterable[Step], tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Storage -> position of the last step that touches it."""
    return {tensors[name].storage: at for at, step in enumerate(steps) for name in (*step.reads, *step.writes)}


def _joined(parts: Sequence[Part]) -> Joiner:
    """Forwards in call order, backwards in reverse."""
    step = Joiner()
    for part in parts:
        step.forward(part)
    step.leave(parts)
    for part in reversed(parts):
        step.backward(part)
    return step


def loss_like(tensor: TensorInfo) -> bool:
    """Whether a tensor has one element, as a loss: its gradient is the caller's, held by `Tensor.backward`."""
    return prod(tensor.shape) == 1


def _accumulate(own: Mapping[str, str], inputs: dict[str, None], outputs: dict[str, None]) -> Step:
    """The step that adds this micro-batch's gradients to those alive since the first one."""
    inputs.update(dict.fromkeys(own))
    for made in own.values():
        outputs.pop(made, None)
    return Step("accumulate", "accumulate", "backward", (*own.values(), *own), (), pure=False)


def _declare(name: str, like: TensorInfo, tensors: dict[str, TensorInfo], storages: dict[str, Storage]) -> None:
    """A gradient being accumulated, of the shape of the one that is added to it."""
    tensors[name] = replace(like, name=name, storage=name)
    storages[name] = Storage(name, storages[like.storage].nbytes, "gradient")


def _renamed(step: Step, names: Mapping[str, str]) -> Step:
    return replace(step, reads=tuple(dict.fromkeys(names.get(name, name) for name in step.reads)))


def with_workspaces(graph: StepGraph, workspaces: Mapping[str, int]) -> StepGraph:
    """The graph with each step's workspace (bytes) looked up by its key."""
    steps = tuple(replace(s, workspace=workspaces[s.key]) if s.key in workspaces else s for s in graph.steps)
    return replace(graph, steps=steps)


def with_inputs(graph: StepGraph, extra: Iterable[tuple[TensorInfo, Storage]]) -> StepGraph:
    """The graph with further tensors alive throughout: parameters and buffers no captured graph reads."""
    new = [(info, storage) for info, storage in extra if info.name not in graph.tensors]
    if not new:
        return graph
    return replace(
        graph,
        inputs=(*graph.inputs, *(info.name for info, _ in new)),
        tensors={**graph.tensors, **{info.name: info for info, _ in new}},
        storages={**graph.storages, **{s.name: s for _, s in new if s.name not in graph.storages}},
    )


def without_outputs(graph: StepGraph) -> StepGraph:
    """The graph when the caller keeps only the loss of the forward's outputs (those of one element stay held).

    The others live until the forward returns, which is a step of its own.
    """
    forward = {name for step in graph.steps[: graph.boundary] for name in step.writes}
    dropped = [n for n in graph.outputs if n in forward and prod(graph.tensors[n].shape) > 1]
    if not dropped:
        return graph
    returned = Step(RETURN, RETURN, "forward", tuple(dropped), (), pure=False)
    steps = (*graph.steps[: graph.boundary], returned, *graph.steps[graph.boundary :])
    return replace(graph, steps=steps, outputs=tuple(n for n in graph.outputs if n not in dropped))
