"""Which axes of a computation each dimension of a tensor is made of, through views, and back.

An axis is a number. A dimension is the axes it was merged from, the slowest first; one of size 1 has none, so that
adding and dropping such dimensions is no change. A view that splits a dimension makes several axes of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from memopt.facts import hint

ATEN = torch.ops.aten
Dim = tuple[int, ...]
Dims = tuple[Dim, ...]

REGROUPS = frozenset({
    *(ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default),
    *(ATEN.view_as.default, ATEN.reshape_as.default),
    *(ATEN.flatten.using_ints, ATEN.unflatten.int, ATEN.unsqueeze.default),
    *(ATEN.squeeze.default, ATEN.squeeze.dim, ATEN.squeeze.dims),
})  # fmt: skip
PERMUTES = frozenset({
    *(ATEN.permute.default, ATEN.transpose.int, ATEN.t.default, ATEN.mT.default, ATEN.numpy_T.default),
    *(ATEN.movedim.int, ATEN.movedim.intlist, ATEN.moveaxis.int, ATEN.moveaxis.intlist),
    *(ATEN.swapaxes.default, ATEN.swapdims.default, ATEN.adjoint.default, ATEN.matrix_H.default),
})  # fmt: skip
CASTS = frozenset({
    *(ATEN.to.dtype, ATEN.to.dtype_layout, ATEN.to.other, ATEN.to.device, ATEN._to_copy.default, ATEN.type_as.default),
})  # fmt: skip
COPIES = frozenset({ATEN.clone.default, ATEN.contiguous.default, ATEN.alias.default})
EXPANDS = frozenset({ATEN.expand.default, ATEN.expand_as.default, ATEN.broadcast_to.default})
REPEATS = frozenset({ATEN.repeat.default, ATEN.repeat_interleave.self_int})
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


class UnlikeError(Exception):
    """The dimensions cannot be told apart, or do not fit."""


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Sizes of the node's tensor."""
    return tuple(hint(size) for size in node.meta["val"].shape)


class Axes:
    """The axes of one computation. sizes: of each; parts: of an axis that turned out to be several."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.parts: dict[int, Dim] = {}

    def new(self, size: int) -> Dim:
        """A dimension of its own."""
        if size == 1:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def flat(self, dim: Iterable[int]) -> Dim:
        """The axes of the dimension that are still one."""
        return tuple(leaf for axis in dim for leaf in (self.flat(self.parts[axis]) if axis in self.parts else (axis,)))

    def all(self, dims: Iterable[Iterable[int]]) -> Dim:
        """The axes of all dimensions."""
        return tuple(axis for dim in dims for axis in self.flat(dim))

    def size(self, dim: Iterable[int]) -> int:
        """Elements along it."""
        return prod(self.sizes[axis] for axis in dim)

    def regrouped(self, dims: Sequence[Dim], shape: Sequence[int]) -> Dims:
        """The same elements in the same order under another shape. Raises UnlikeError where sizes share no factor."""
        queue = list(self.flat(axis for dim in dims for axis in dim))
        found = tuple(self._taken(queue, size) for size in shape)
        if queue:
            raise UnlikeError
        return found

    def _taken(self, queue: list[int], size: int) -> Dim:
        """Axes from the queue's head that make up a dimension of this size."""
        taken: list[int] = []
        while size > 1:
            if not queue:
                raise UnlikeError
            axis = queue.pop(0)
            if size % self.sizes[axis]:
                axis, rest = self.split(axis, size)
                queue.insert(0, rest)
            size //= self.sizes[axis]
            taken.append(axis)
        return tuple(taken)

    def split(self, axis: int, size: int) -> Dim:
        """Two axes of one, the slower of this size."""
        if self.sizes[axis] % size:
            raise UnlikeError
        self.parts[axis] = (*self.new(size), *self.new(self.sizes[axis] // size))
        if len(self.parts[axis]) != 2:
            raise UnlikeError
        return self.parts[axis]

    def down(self, node: fx.Node, dims: Dims) -> Dims:
        """Dimensions of the node's result, given those of its first argument."""
        if node.target in REGROUPS:
            return self.regrouped(dims, shape_of(node))
        if node.target in PERMUTES:
            return tuple(dims[at] for at in permutation(node))
        return dims

    def up(self, node: fx.Node, dims: Dims) -> Dims:
        """Dimensions of the node's first argument, given those of its result. What was repeated has lost axes.

        Raises UnlikeError for what is no view and no repetition.
        """
        source: Any = node.args[0]
        if node.target in REGROUPS:
            return self.regrouped(dims, shape_of(source))
        if node.target in PERMUTES:
            order = permutation(node)
            return tuple(dims[order.index(at)] for at in range(len(order)))
        if node.target in EXPANDS | REPEATS:
            return self._unrepeated(node, dims)
        if node.target in CASTS | COPIES:
            return dims
        raise UnlikeError

    def _unrepeated(self, node: fx.Node, dims: Dims) -> Dims:
        source: Any = node.args[0]
        small, large = shape_of(source), shape_of(node)
        if len(small) > len(large):
            raise UnlikeError
        kept = dims[len(large) - len(small) :]
        minor = node.target is ATEN.repeat_interleave.self_int  # copies of an element stand side by side
        pairs = zip(kept, small, large[len(large) - len(small) :], strict=True)
        return tuple(dim if n == m else self._once(self.flat(dim), n, m, minor) for dim, n, m in pairs)

    def _once(self, dim: Dim, size: int, repeated: int, minor: bool) -> Dim:
        """What is left of a dimension that was repeated."""
        if size == 1:
            return ()
        outer, inner = self.regrouped((dim,), (size, repeated // size) if minor else (repeated // size, size))
        return outer if minor else inner


def permutation(node: fx.Node) -> tuple[int, ...]:
    """Which dimension of the argument each of the result's is: told by one whose sizes all differ."""
    rank = len(node.meta["val"].shape)
    told = torch.empty(PRIMES[:rank], device="meta")
    target: Any = node.target
    return tuple(PRIMES.index(size) for size in target(told, *map(_plain, node.args[1:]), **node.kwargs).shape)


def _plain(arg: Any) -> Any:
    return hint(arg) if isinstance(arg, torch.SymInt) else arg
