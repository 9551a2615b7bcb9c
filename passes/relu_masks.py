"""What a relu let through, not what it made: saved as booleans where nothing else of the backward reads its output.

The backward of a relu is `where(result <= threshold, 0, grad)` (derivatives.yaml, threshold_backward). As one operation
it holds the whole output until then. With the comparison made in the forward it holds a byte an element, and
`memopt.passes.pack_masks` an eighth of that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from memopt.facts import FACTS, facts, tensor_inputs
from memopt.graph import StepGraph
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.photograph import photograph
from memopt.places import edited
from memopt.program import FORWARD, Program, boundary

ATEN = torch.ops.aten
SAME = (ATEN.detach.default, ATEN.alias.default)
COMPARISONS = (ATEN.le.Scalar, ATEN.gt.Scalar, ATEN.lt.Scalar, ATEN.ge.Scalar)


def relu_masks(program: Program) -> PassResult:
    """Compare in the forward what the backward would only compare."""
    return edited(program, _sites, _compare_early)


def _sites(program: Program) -> list[fx.Node]:
    compared = [(node, read) for node in _backward(program) if (read := _compared(node)) is not None]
    if not compared:
        return []
    graph = photograph(program)
    late = Counter(
        graph.storage_of(name)
        for step in graph.steps[graph.boundary :]
        if not graph.is_view(step)
        for name in step.reads
    )
    return [node for node, read in compared if _alone(program, graph, late, read) and _alike(node, read)]


def _backward(program: Program) -> list[fx.Node]:
    nodes = list(program.graph.nodes)
    first = boundary(program)
    return nodes[nodes.index(first) :] if first is not None else []


def _compared(node: fx.Node) -> fx.Node | None:
    """The value that this node only compares with a number; None if it does something else."""
    if node.target is not ATEN.threshold_backward.default and node.target not in COMPARISONS:
        return None
    value = tensor_inputs(node)[-1]
    while value.target in SAME:
        value = value.all_input_nodes[0]
    return value


def _alone(program: Program, graph: StepGraph, late: Counter[str], read: fx.Node) -> bool:
    """Whether the value is made in the forward, let go there by all others, and more bytes than a mask of it."""
    name = program.name(read)
    made = graph.producer.get(name, graph.boundary)
    home = graph.storage_of(name)
    held = home in graph.output_storages or home in graph.input_storages
    smaller = prod(graph.tensors[name].shape) < graph.storages[home].nbytes  # not so of an expanded value
    return made < graph.boundary and late[home] == 1 and not held and smaller


def _alike(node: fx.Node, read: fx.Node) -> bool:
    """Whether elements compare as before, and the new operation lays its result out as the old one, so that sums of it
    are taken in the same order. A relu's backward compares in fp32; `le` rounds the number to the value's type."""
    if node.target is not ATEN.threshold_backward.default:
        return isinstance(node.args[1], int | float)
    grad, value, old = (n.meta["val"] for n in (tensor_inputs(node)[0], read, node))
    number = node.args[2]
    if not isinstance(number, int | float) or torch.tensor(number, dtype=value.dtype).item() != number:
        return False
    with old.fake_mode:
        new = ATEN.where.ScalarSelf(ATEN.le.Scalar(value, number), 0.0, grad)
    return (new.dtype, new.shape, new.stride()) == (old.dtype, old.shape, old.stride())


def _compare_early(program: Program, sites: list[fx.Node]) -> None:
    for node in sites:
        _early(program.graph, node)


def _early(graph: fx.Graph, node: fx.Node) -> None:
    read = _compared(node)
    assert read is not None
    with graph.inserting_after(read):
        number = node.args[2] if node.target is ATEN.threshold_backward.default else node.args[1]
        target = ATEN.le.Scalar if node.target is ATEN.threshold_backward.default else node.target
        mask = graph.call_function(target, (read, number))  # type: ignore[arg-type]
    mask.meta = {key: value for key, value in read.meta.items() if key not in (FACTS, "val", "tensor_meta")}
    mask.meta["partitioner_tag"] = FORWARD
    with read.meta["val"].fake_mode:
        mask.meta["val"] = target(read.meta["val"], number)  # type: ignore[operator]
    facts(mask)
    if target is node.target:
        node.replace_all_uses_with(mask)
        graph.erase_node(node)
        return
    node.target, node.args = ATEN.where.ScalarSelf, (mask, 0.0, node.args[0])
    node.meta.pop(FACTS, None)


@dataclass(frozen=True)
class ReluMasks(Cleanup):
    """Let no backward hold a relu's output to compare it. Assumes: nothing; the same comparison is made earlier."""

    name, numerics, run = "relu_masks", Numerics.EXACT, staticmethod(relu_masks)
