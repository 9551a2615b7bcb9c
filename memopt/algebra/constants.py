"""Values of nodes that no input reaches, computed for real: masks of positions, numbers in tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from memopt.forward import written

MOST = 1 << 22  # elements: computed while nobody notices, and no host memory of note


def constant(node: fx.Node) -> Tensor | None:
    """The node's value; None if an input, a draw or something large is behind it."""
    behind = _behind(node)
    if behind is None:
        return None
    known: dict[fx.Node, Any] = {}
    with _disable_current_modes(), torch.no_grad():
        for each in behind:
            known[each] = _value(each, known)
    found: Tensor = known[node]
    return found


def number(arg: Any) -> float | None:
    """A number, or the one that a tensor of a single element holds; None if it is neither, or nobody knows yet."""
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return float(arg)
    if isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), Tensor) and arg.meta["val"].numel() == 1:
        found = constant(arg)
        return None if found is None else float(found.double().item())
    return None


def _behind(node: fx.Node) -> list[fx.Node] | None:
    """The node and what it is made of, in the graph's order; None if it is no constant."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        if written(each) or not (_kept(each) or _computable(each)):
            return None
        seen.add(each)
        waiting += each.all_input_nodes
    return sorted(seen)


def _kept(node: fx.Node) -> bool:
    """A tensor that was written out in the user's code."""
    return node.op == "get_attr" and isinstance(_attribute(node), Tensor)


def _attribute(node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(node.graph.owning_module)


def _computable(node: fx.Node) -> bool:
    """Whether the node may be run ahead: a call that draws nothing, writes nothing and makes few elements."""
    target, value = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(value, Tensor):
        return False
    small = all(isinstance(size, int) for size in value.shape) and value.numel() <= MOST
    return small and torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return _attribute(node)
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    target: Any = node.target
    return target(*args, **kwargs)
