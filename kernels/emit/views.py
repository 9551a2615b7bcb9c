"""Views leave no code: they change the index at which what they look at is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from memopt.kernels.emit.indices import ZERO, Index, Unreadable, reshaped, total
from memopt.kernels.emit.nodes import argument, dimension, name_of, shape_of

Place = tuple[Index, ...]
View = Callable[[fx.Node, Place], tuple[Any, Place]]  # node, index in it -> what is looked at, index in that


def _same(node: fx.Node, index: Place) -> tuple[Any, Place]:
    return node.args[0], index


def _reshape(node: fx.Node, index: Place) -> tuple[Any, Place]:
    x = node.args[0]
    return x, reshaped(index, shape_of(node), shape_of(x))


def _permute(node: fx.Node, index: Place) -> tuple[Any, Place]:
    order: Any = node.args[1]
    found = [ZERO] * len(order)
    for at, dim in enumerate(order):
        found[dim % len(order)] = index[at]
    return node.args[0], tuple(found)


def spread(index: Place, shape: tuple[int, ...]) -> Place:
    """The index in a tensor of this shape, broadcast: dimensions missing in front, and those of one element."""
    inner = index[len(index) - len(shape) :]
    return tuple(ZERO if n == 1 else i for n, i in zip(shape, inner, strict=True))


def _expand(node: fx.Node, index: Place) -> tuple[Any, Place]:
    return node.args[0], spread(index, shape_of(node.args[0]))


def _slice(node: fx.Node, index: Place) -> tuple[Any, Place]:
    x, size = node.args[0], shape_of(node.args[0])
    dim, step = dimension(node, 1, len(size)), int(argument(node, 4, 1))
    moved = total([(step, index[dim])]).shifted(first_of(argument(node, 2, 0), size[dim]))
    return x, (*index[:dim], moved, *index[dim + 1 :])


def first_of(first: int, size: int) -> int:
    """Where a slice begins, counted from the front and within what there is."""
    return min(max(first + size if first < 0 else first, 0), size)


def _select(node: fx.Node, index: Place) -> tuple[Any, Place]:
    x, size = node.args[0], shape_of(node.args[0])
    dim = dimension(node, 1, len(size))
    return x, (*index[:dim], Index((), int(argument(node, 2)) % size[dim]), *index[dim:])


def _piece(node: fx.Node, index: Place) -> tuple[Any, Place]:
    """One of the pieces of a split."""
    split: Any = node.args[0]
    if name_of(split) != "split_with_sizes":
        raise Unreadable(f"a part of {name_of(split)}")
    dim, sizes = dimension(split, 2, len(index)), argument(split, 1)
    moved = index[dim].shifted(sum(sizes[: argument(node, 1)]))
    return split.args[0], (*index[:dim], moved, *index[dim + 1 :])


VIEWS: dict[str, View] = {
    **dict.fromkeys(("alias", "clone", "detach", "lift_fresh_copy"), _same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"), _reshape),
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "getitem": _piece,
}
