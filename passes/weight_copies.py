"""The copies of convolution weights in channels last that Inductor makes, as values of the program.

On a CPU Inductor computes every convolution in channels last (GraphLowering.decide_layout_opt). It copies the weight
for that, and where the backward reads it, what is saved is the copy: of all weights, 42 MiB of a ResNet-18. Written in
the program they are seen by the plan, which keeps them or has them made again right before the backward reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from memopt.facts import FACTS
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.places import edited
from memopt.program import Program

ATEN = torch.ops.aten
WEIGHT = {ATEN.convolution.default: 1, ATEN.convolution_backward.default: 2}  # operation -> its argument


def weight_copies(program: Program) -> PassResult:
    """Have convolutions read a copy of a parameter, made before the first of them."""
    return edited(program, _sites, _copy)


def _sites(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Parameters that are copied, and the convolutions that read each, in order."""
    read: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        weight = _weight(node)
        if isinstance(weight, fx.Node) and weight.op == "placeholder" and _copied(weight.meta["val"]):
            read.setdefault(weight, []).append(node)
    return read


def _weight(node: fx.Node) -> object:
    at = WEIGHT.get(node.target) if node.op == "call_function" else None  # type: ignore[call-overload]
    return None if at is None else node.args[at]


def _copied(value: object) -> bool:
    """Whether it lies on a CPU otherwise than in channels last, in which it is an image's kernel."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.device.type != "cpu":
        return False
    return value.is_contiguous() and not value.is_contiguous(memory_format=torch.channels_last)


def _copy(program: Program, sites: dict[fx.Node, list[fx.Node]]) -> None:
    for weight, readers in sites.items():
        _copied_once(program.graph, weight, readers)


def _copied_once(graph: fx.Graph, weight: fx.Node, readers: list[fx.Node]) -> None:
    with graph.inserting_before(readers[0]):
        twin = graph.call_function(ATEN.clone.default, (weight,), {"memory_format": torch.channels_last})
    twin.meta = {k: v for k, v in readers[0].meta.items() if k in ("stack_trace", "seq_nr", "partitioner_tag")}
    with weight.meta["val"].fake_mode:
        twin.meta["val"] = ATEN.clone.default(weight.meta["val"], memory_format=torch.channels_last)
    for node in readers:
        at = WEIGHT[node.target]  # type: ignore[index]
        node.args = (*node.args[:at], twin, *node.args[at + 1 :])
        node.meta.pop(FACTS, None)


@dataclass(frozen=True)
class WeightCopies(Cleanup):
    """Show the plan the copies of weights that are made anyway. Assumes: oneDNN computes convolutions on the CPU."""

    name, numerics, lowerings, run = "weight_copies", Numerics.EXACT, ("inductor",), staticmethod(weight_copies)
