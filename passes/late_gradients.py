"""A weight's gradient is computed after what else reads the values it is made of, if one of them ends there.

Autograd computes it first: an output projection's gradient stands beside the whole backward of the attention that reads
the same value. Computed after the reader with which the first of its inputs would go, it stands beside nothing that it
need not, and no moment holds more: what was held at that reader is what is held at most when it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from memopt.facts import facts, is_fusable
from memopt.graph import StepGraph
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.photograph import photograph
from memopt.places import edited
from memopt.program import Program


def late_gradients(program: Program) -> PassResult:
    """Move library calls that make nothing but a gradient the caller gets, with its views, behind such readers."""
    return edited(program, _sites, _moved)


def _sites(program: Program) -> list[tuple[fx.Node, int, fx.Node]]:
    """Such calls, and the position and the node of the reader behind which each belongs."""
    graph = photograph(program)
    nodes = {program.name(node): node for node in program.graph.nodes}
    found = []
    for at, step in enumerate(graph.steps):
        node = nodes.get(step.name)
        if node is None or step.phase != "backward" or is_fusable(node) or not _given_away(node):
            continue
        reader = _reader(graph, at)
        if reader > at:
            found.append((node, reader, nodes[graph.steps[reader].name]))
    return found


def _moved(program: Program, sites: list[tuple[fx.Node, int, fx.Node]]) -> None:
    behind: dict[int, fx.Node] = {}  # position of a reader -> the last node that stands behind it
    for node, at, reader in sites:
        for moved in _with_views(node):
            behind.setdefault(at, reader).append(moved)
            behind[at] = moved


def _reader(graph: StepGraph, at: int) -> int:
    """The position behind which one of the values that the step reads would be let go of; its own if it is the last."""
    lasting = {*graph.input_storages, *graph.output_storages}
    read = {graph.storage_of(name) for name in graph.steps[at].reads} - lasting
    return min((graph.uses[storage][-1] for storage in read), default=at)


def _given_away(node: fx.Node) -> bool:
    """Whether it makes one tensor of its own, which is returned, itself or views of it, and read by nobody."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    known = facts(node)
    made = known.made[0]
    alone = known.pure and not known.random and made is not None and made.home is None
    return alone and bool(node.users) and all(each is node or _views(each) for each in _with_views(node))


def _with_views(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and what stands between it and the program's end."""
    yield node
    for user in node.users:
        if user.op != "output":
            yield from _with_views(user)


def _views(node: fx.Node) -> bool:
    """Whether it only looks at what it reads."""
    made = facts(node).made
    return len(made) == 1 and made[0] is not None and made[0].home == 0 and facts(node).pure


@dataclass(frozen=True)
class LateGradients(Cleanup):
    """Compute weights' gradients where nothing else waits. Assumes: nothing; the same calls, in another order."""

    name, numerics, run = "late_gradients", Numerics.EXACT, staticmethod(late_gradients)
