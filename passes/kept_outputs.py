"""Of a clamping activation, what it was given and what it made are not both saved: its backward reads what it made.

hardtanh (relu6 is one) and leaky_relu ask of their input only where it lies: at or below the lower bound, at or above
the upper one, above zero. Of their output the same questions have the same answers, element for element, NaN included:
clamping moves no element across a bound that its type can write (backwards compare in fp32, and bf16 rounds 0.7 to less
than that), and a slope of 0 or more no element across zero. Where the output is held for another step of the backward
(the next convolution's weight gradient) and the input is not, the input is then let go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memopt.facts import FACTS
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.places import edited
from memopt.program import Program, boundary

ATEN = torch.ops.aten
# backward (gradient, saved, options) -> the forward (input, options) that it belongs to
CLAMPS: dict[Any, Any] = {
    ATEN.hardtanh_backward.default: ATEN.hardtanh.default,
    ATEN.leaky_relu_backward.default: ATEN.leaky_relu.default,
}
DEFAULTS: dict[Any, tuple[float, ...]] = {ATEN.hardtanh.default: (-1.0, 1.0), ATEN.leaky_relu.default: (0.01,)}


def kept_outputs(program: Program) -> PassResult:
    """Have backwards of clamps read the output, where a later step holds it anyway."""
    return edited(program, _sites, _read_outputs)


def _sites(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Backwards, and what their clamps made."""
    late = _late(program)
    return [(node, made) for node in late if (made := _made(node)) is not None and _gains(node, made, late)]


def _read_outputs(program: Program, sites: list[tuple[fx.Node, fx.Node]]) -> None:
    for node, made in sites:
        node.args = (node.args[0], made, *node.args[2:])
        node.meta.pop(FACTS, None)


def _late(program: Program) -> dict[fx.Node, None]:
    """Nodes of the backward, in order."""
    first, nodes = boundary(program), list(program.graph.nodes)
    return dict.fromkeys(nodes[nodes.index(first) :] if first is not None else [])


def _made(node: fx.Node) -> fx.Node | None:
    """What the clamp made whose backward this is; None if it is none, or reads it already."""
    forward = CLAMPS.get(node.target)
    if forward is None:
        return None
    given, options = node.args[1], node.args[2 : 2 + len(DEFAULTS[forward])]
    if forward is ATEN.leaky_relu.default and (node.args[3] or not options[0] >= 0):  # type: ignore[operator]
        return None
    assert isinstance(given, fx.Node)
    if forward is ATEN.hardtanh.default and not all(_written(number, given) for number in options):
        return None
    twins = (user for user in given.users if user.target is forward and _options(user) == options)
    return next((twin for twin in twins if twin.meta["val"].dtype == given.meta["val"].dtype), None)


def _options(node: fx.Node) -> tuple[object, ...]:
    default = DEFAULTS[node.target]
    return (*node.args[1:], *default[len(node.args) - 1 :])


def _written(number: Any, value: fx.Node) -> bool:
    """Whether the value's type holds this number; fp32's do, to which kernels round it themselves."""
    dtype = value.meta["val"].dtype
    return dtype is torch.float32 or bool(torch.tensor(number, dtype=dtype).item() == number)


def _gains(node: fx.Node, made: fx.Node, late: dict[fx.Node, None]) -> bool:
    """Whether what the clamp made lives on anyway, and what it was given does not."""
    given = node.args[1]
    assert isinstance(given, fx.Node)
    kept = given.op == "placeholder" or any(user.op == "output" for user in given.users)
    return not kept and _held(made, node, late) and not _held(given, node, late)


def _held(made: fx.Node, node: fx.Node, late: dict[fx.Node, None]) -> bool:
    """Whether another node of the backward reads this value, or a view of it."""
    stack, seen = [made], {made}
    while stack:
        for user in stack.pop().users:
            if user in late:
                if user is not node and user.op != "output":
                    return True
            elif user not in seen and _looks(user):
                seen.add(user)
                stack.append(user)
    return False


def _looks(node: fx.Node) -> bool:
    """Whether the node is a view of what it reads first."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.is_view


@dataclass(frozen=True)
class KeptOutputs(Cleanup):
    """Let no backward of a clamp hold its input beside its output. Assumes: nothing; the same comparison is made."""

    name, numerics, run = "kept_outputs", Numerics.EXACT, staticmethod(kept_outputs)
