"""A backward that asks of a value only its shape is given an empty one: the value itself dies in the forward.

The gradient of a frozen convolution's input is made of the output's gradient and the weight; the operation takes the
input as well, for the weight's gradient, which nobody wants (derivatives.yaml, convolution; in untraced PyTorch this is
what keeps every input of frozen convolutions, huggingface/peft#2196). So it is with a frozen batch norm in evaluation,
and with a norm of which only the bias's gradient is wanted: a sum of what comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memopt.facts import FACTS, hint, storage_bytes
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.places import edited
from memopt.program import Program, boundary

ATEN = torch.ops.aten


def _convolution(args: tuple[Any, ...]) -> tuple[int, ...]:
    return () if args[10][1] else (1,)


def _batch_norm(args: tuple[Any, ...]) -> tuple[int, ...]:
    (x, weight, _), train = args[9], args[7]
    return () if weight or (x and train) else (1,)


def _layer_norm(args: tuple[Any, ...]) -> tuple[int, ...]:
    return () if args[7][0] or args[7][1] else (1, 3, 4)


def _group_norm(args: tuple[Any, ...]) -> tuple[int, ...]:
    return () if args[9][0] or args[9][1] else (1, 2, 3)


# backward -> positions of arguments whose values it does not read, by its mask: gradients of (input, weight, bias)
UNREAD: dict[Any, Callable[[tuple[Any, ...]], tuple[int, ...]]] = {
    ATEN.convolution_backward.default: _convolution,
    ATEN.native_batch_norm_backward.default: _batch_norm,
    ATEN.native_layer_norm_backward.default: _layer_norm,
    ATEN.native_group_norm_backward.default: _group_norm,
}
Argument = tuple[fx.Node, int]  # of a node, the argument at this position


def unread_inputs(program: Program) -> PassResult:
    """Hand an empty tensor to each backward that does not read an argument, where that is held for nothing else."""
    return edited(program, _sites, _emptied)


def _sites(program: Program) -> dict[fx.Node, list[int]]:
    """Backwards, and which of their arguments."""
    late = _late(program)
    unread = list(_unread(late))
    found: dict[fx.Node, list[int]] = {}
    for node, at in unread:
        if _for_nothing(_given((node, at)), unread, late):
            found.setdefault(node, []).append(at)
    return found


def _emptied(program: Program, sites: dict[fx.Node, list[int]]) -> None:
    for node, places in sites.items():
        for at in places:
            node.args = (*node.args[:at], _empty(program.graph, (node, at)), *node.args[at + 1 :])
        node.meta.pop(FACTS, None)


def _unread(late: dict[fx.Node, None]) -> Iterator[Argument]:
    for node in late:
        if node.op == "call_function" and node.target in UNREAD:
            yield from ((node, at) for at in UNREAD[node.target](node.args))


def _late(program: Program) -> dict[fx.Node, None]:
    """Nodes of the backward, in order."""
    first, nodes = boundary(program), list(program.graph.nodes)
    return dict.fromkeys(nodes[nodes.index(first) :] if first is not None else [])


def _given(place: Argument) -> fx.Node:
    given = place[0].args[place[1]]
    assert isinstance(given, fx.Node)
    return given


def _for_nothing(given: fx.Node, unread: list[Argument], late: dict[fx.Node, None]) -> bool:
    """Whether the value's bytes are its own, made in the forward, and nothing in the backward reads them."""
    made = given.op == "call_function" and given not in late
    alone = not any(_share(given, node) for node in (*given.all_input_nodes, *given.users))
    places = [(user, at) for user in given.users if user in late for at, arg in enumerate(user.args) if arg is given]
    return made and alone and all(place in unread for place in places)


def _share(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values are views of the same bytes; so is what the caller gets."""
    values = [node.meta.get("val") for node in (one, other)]
    homes = [v.untyped_storage()._cdata if isinstance(v, torch.Tensor) else None for v in values]
    return homes[0] == homes[1] or other.op == "output"


def _empty(graph: fx.Graph, place: Argument) -> fx.Node:
    """A tensor of the argument's shape, strides and type whose values nobody set, made just before the node.

    A value of zero strides would be no fewer bytes: the kernels lay the input out before they look at their mask.
    """
    node, value = place[0], _given(place).meta["val"]
    layout = [hint(n) for n in value.shape], [hint(n) for n in value.stride()]
    options = {"dtype": value.dtype, "device": value.device}
    with graph.inserting_before(node):
        empty = graph.call_function(ATEN.empty_strided.default, layout, options)
    empty.meta = {key: entry for key, entry in node.meta.items() if key in ("stack_trace", "partitioner_tag")}
    with value.fake_mode:
        empty.meta["val"] = torch.empty_strided(*layout, **options)
    assert storage_bytes(empty.meta["val"]) <= storage_bytes(value)
    return empty


@dataclass(frozen=True)
class UnreadInputs(Cleanup):
    """Let no backward hold a value of which it asks the shape. Assumes: masked gradients are not made (ATen)."""

    name, numerics, run = "unread_inputs", Numerics.EXACT, staticmethod(unread_inputs)
