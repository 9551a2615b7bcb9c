"""Updates in backward: where in a planned step they stand, and the same calls put into the backward graph.

A parameter's update runs as soon as its gradient is final and nothing reads the parameter any more; the gradient is let
go with it. Planned as steps of the backward (memopt/compose.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, fx

from memopt.compose import last_uses
from memopt.errors import VerifyError
from memopt.facts import is_getitem
from memopt.graph import StepGraph
from memopt.merged import UPDATE
from memopt.program import Program

Updates = Mapping[str, tuple[str, Callable[[Tensor], None]]]


def overtaken(graph: StepGraph, names: Iterable[str]) -> frozenset[str]:
    """Those of the parameters that a step reads after their update: a copy that a plan put there."""
    updates = {name: _first_update(graph, name) for name in names}
    last = last_uses((s for s in graph.steps if not s.name.startswith(UPDATE)), graph.tensors)
    plain = [at for at, step in enumerate(graph.steps) if not step.name.startswith(UPDATE)]
    touched = {storage: plain[at] for storage, at in last.items()}
    return frozenset(name for name, at in updates.items() if touched.get(graph.storage_of(name), -1) > at)


def _first_update(graph: StepGraph, name: str) -> int:
    home = graph.storage_of(name)
    return next(at for at in graph.uses[home] if graph.steps[at].name.startswith(UPDATE))


def anchors(graph: StepGraph, names: Iterable[str]) -> dict[str, str]:
    """Parameter -> the step of the captured program that its update stands behind, in the order of the updates."""
    placed = sorted(names, key=lambda name: _first_update(graph, name))
    return {name: _before(graph, _first_update(graph, name)) for name in placed}


def _before(graph: StepGraph, at: int) -> str:
    return next(step.name for step in reversed(graph.steps[:at]) if not step.name.startswith(UPDATE))


def with_updates(program: Program, backward: fx.GraphModule, updates: Updates) -> None:
    """Have the backward call each parameter's update where the plan has it, and return None for its gradient, in place.

    updates: parameter -> (the step it stands behind, what to call with the gradient), in order.
    """
    output = backward.graph.output_node()
    gradients = list(output.args[0])  # type: ignore[arg-type]
    nodes = {program.prefix + node.name: node for node in backward.graph.nodes}
    place = {program.name(holder): at for at, holder in enumerate(_trained(program))}
    for name, (anchor, update) in updates.items():
        if anchor not in nodes or gradients[place[name]] is None:
            raise VerifyError(f"the update of {name} stands behind {anchor!r}, which the backward does not have")
        behind = nodes[anchor]
        while is_getitem(behind.next):
            behind = behind.next
        with backward.graph.inserting_after(behind):
            nodes[anchor] = backward.graph.call_function(update, (gradients[place[name]],))
        gradients[place[name]] = None
    output.args = (tuple(gradients),)
    backward.recompile()


def _trained(program: Program) -> list[fx.Node]:
    """The holders whose gradients the backward returns, in order."""
    return [n for n in program.graph.find_nodes(op="placeholder") if program.kinds.get(n.name) != "tangent"]
