"""What is read off a node of a region: its operation's name, its shape, what it reduces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from memopt.kernels.emit import words
from memopt.kernels.emit.indices import Unreadable

REDUCTIONS = {"sum": ("sum", "0"), "amax": ("max", 'float("-inf")'), "amin": ("min", 'float("inf")')}


def name_of(node: fx.Node) -> str:
    """Of its operation, without overload: "add"."""
    target: Any = node.target
    whole = isinstance(target, torch._ops.OpOverload)
    return target.__name__.split(".")[0] if whole else getattr(target, "__name__", "")


def argument(node: fx.Node, at: int, default: Any = None) -> Any:
    """An argument by its place."""
    return node.args[at] if at < len(node.args) and node.args[at] is not None else default


def value_of(node: Any) -> Tensor:
    """The fake value. Raises Unreadable for what is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        raise Unreadable("a value that is no tensor")
    return value


def shape_of(node: Any) -> tuple[int, ...]:
    """Of its value."""
    return tuple(value_of(node).shape)


def kind_of(node: Any) -> str:
    """The type it is computed in."""
    return words.kind(value_of(node).dtype)


def dimension(node: fx.Node, at: int, rank: int) -> int:
    """A dimension that an argument names, from the front."""
    return int(argument(node, at, 0)) % rank


def reduced(node: fx.Node) -> tuple[int, ...]:
    """The dimensions a reduction is over, in order."""
    rank, given = len(shape_of(node.args[0])), argument(node, 1)
    if given is None or given == []:
        return tuple(range(rank))
    dims = [given] if isinstance(given, int) else list(given)
    return tuple(sorted(dim % max(rank, 1) for dim in dims))
