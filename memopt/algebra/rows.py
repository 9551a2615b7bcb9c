"""Which dimension of each tensor runs along the rows that a computation treats one by one.

A row is what stands at one number of an axis, say a position of a sequence. A node is rowwise where each row of its
result is made of the same row of some arguments and of other arguments as a whole: products with a weight, what is
pointwise, norms and reductions within a row. Attention is not, nor is a sum over the rows. Such nodes may run on a few
rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from memopt.algebra.axes import ATEN, CASTS, COPIES, EXPANDS, PERMUTES, REGROUPS, permutation, shape_of
from memopt.algebra.contraction import contraction
from memopt.facts import is_getitem

PARTS = frozenset({ATEN.slice.Tensor, ATEN.split.Tensor, ATEN.split_with_sizes.default, ATEN.chunk.default})
PARTS |= {ATEN.split.sizes, ATEN.narrow.default, ATEN.glu.default}  # of a dimension, which stays
WITHIN = frozenset({ATEN.softmax.int, ATEN.log_softmax.int, ATEN._softmax.default, ATEN._log_softmax.default})
NORMS = frozenset({ATEN.layer_norm.default, ATEN.rms_norm.default})
REDUCTIONS = frozenset({
    *(ATEN.mean.dim, ATEN.sum.dim_IntList, ATEN.amax.default, ATEN.amin.default, ATEN.logsumexp.default),
    *(ATEN.var.correction, ATEN.var.dim, ATEN.std.correction, ATEN.linalg_vector_norm.default),
})  # fmt: skip
POINTWISE = frozenset({ATEN.where.ScalarOther, ATEN.where.ScalarSelf, ATEN.where.Scalar, ATEN.masked_fill.Tensor})
POINTWISE |= {ATEN.dropout.default, ATEN.silu.default, ATEN.detach.default, ATEN.zeros_like.default}
LOSSES = {ATEN.mse_loss.default: 2, ATEN.kl_div.default: 2, ATEN.l1_loss.default: 2}  # which argument is the reduction


class Across(Exception):  # no error: what is asked is not so
    """Rows of the result are made of several rows, or nobody knows."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's rows are: its dimension `dim`, of outer x rows x inner elements."""

    dim: int
    inner: int = 1


Known = dict[fx.Node, Place]


@dataclass(frozen=True)
class Rows:
    """A computation of `count` rows."""

    count: int

    def read(self, node: fx.Node, place: Place) -> Known:
        """Where the rows of the node's arguments are, given those of its result; arguments left out are read whole.

        For a node that makes several tensors, all of them have their rows there. Raises Across.
        """
        target, args = node.target, node.args
        if not isinstance(target, torch._ops.OpOverload) and not is_getitem(node):
            raise Across
        first: Any = args[0] if args else None
        if is_getitem(node) or target in CASTS | COPIES:
            return {first: place}
        if target in REGROUPS:
            return {first: self.regrouped(place, shape_of(node), shape_of(first))}
        if target in PERMUTES:
            return {first: Place(permutation(node)[place.dim], place.inner)}
        if target is ATEN.linear.default:
            return {first: self._kept(place, shape_of(node), {len(shape_of(node)) - 1})}
        if target is ATEN.addmm.default:
            return self._aligned(node, place, (args[1],)) if place.dim == 0 else self._across()
        if (product := contraction(node)) is not None and product.added is None:
            return self._product(product, place)
        if target in PARTS | WITHIN:
            rank = len(shape_of(first))
            return {first: self._kept(place, shape_of(first), {_dim(node) % rank})}
        if target in NORMS:
            rank, last = len(shape_of(first)), len(args[1])  # type: ignore[arg-type]
            return {first: self._kept(place, shape_of(first), set(range(rank - last, rank)))}
        if target in REDUCTIONS:
            return {first: self._reduced(node, place)}
        if target is ATEN.cat.default:
            self._kept(place, shape_of(node), {_dim(node) % len(shape_of(node))})
            return dict.fromkeys(first, place)
        if target is ATEN.embedding.default:
            return {args[1]: self._kept(place, shape_of(node), {len(shape_of(node)) - 1})}  # type: ignore[dict-item]
        if _pointwise(node) or target in EXPANDS:
            return self._aligned(node, place, tuple(node.all_input_nodes))
        raise Across

    def _across(self) -> Known:
        raise Across

    def made(self, node: fx.Node, known: Known) -> Place | None:
        """Where the rows of the node's result are, given those of arguments; None if it reads no rows.

        Arguments that nobody knows of may have rows as well. Raises Across.
        """
        told = {arg: known[arg] for arg in node.all_input_nodes if arg in known}
        if not told:
            return None
        for place in self._candidates(node, {each.inner for each in told.values()}):
            try:
                read = self.read(node, place)
            except Across:
                continue
            if all(read.get(arg) == at for arg, at in told.items()):
                return place
        raise Across

    def _candidates(self, node: fx.Node, inner: set[int]) -> Iterator[Place]:
        values = node.meta["val"] if isinstance(node.meta.get("val"), (list, tuple)) else [node.meta.get("val")]
        if not all(isinstance(value, Tensor) for value in values):
            return
        for dim, size in enumerate(values[0].shape):
            every = inner | {1} if node.target not in REGROUPS else set(_divisors(size // self.count, size))
            yield from (Place(dim, n) for n in sorted(every) if size % (self.count * n) == 0)

    def regrouped(self, place: Place, shape: tuple[int, ...], into: tuple[int, ...]) -> Place:
        """The place in another shape of the same elements in the same order."""
        below = place.inner * prod(shape[place.dim + 1 :])  # elements of a row that lie side by side
        for dim, size in enumerate(into):
            after = prod(into[dim + 1 :])
            if below % after == 0 and size % (below // after * self.count) == 0:
                return Place(dim, below // after)
        raise Across

    def resized(self, shape: tuple[int, ...], place: Place, count: int) -> tuple[int, ...]:
        """The shape of `count` rows."""
        return tuple(size // self.count * count if at == place.dim else size for at, size in enumerate(shape))

    def _kept(self, place: Place, shape: tuple[int, ...], busy: set[int]) -> Place:
        """The place, which is none of the busy dimensions."""
        if place.dim in busy or shape[place.dim] % self.count:
            raise Across
        return place

    def _product(self, product: Any, place: Place) -> Known:
        label = product.result[place.dim]
        found = {
            operand: Place(labels.index(label), place.inner)
            for operand, labels in zip(product.operands, product.labels, strict=True)
            if label in labels and shape_of(operand)[labels.index(label)] != 1
        }
        if not found or (product.operands[0] is product.operands[1] and len(set(product.labels)) > 1):
            raise Across
        return found

    def _reduced(self, node: fx.Node, place: Place) -> Place:
        source: Any = node.args[0]
        rank = len(shape_of(source))
        given: Any = node.args[_position(node, "dim")] if len(node.args) > 1 else node.kwargs.get("dim")
        if given is None or given == []:
            raise Across
        gone = {dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])}
        left = list(range(rank)) if _argument(node, "keepdim") else [at for at in range(rank) if at not in gone]
        return self._kept(Place(left[place.dim], place.inner), shape_of(source), gone)

    def _aligned(self, node: fx.Node, place: Place, args: tuple[Any, ...]) -> Known:
        """Arguments that have the result's rows, as broadcasting aligns them."""
        rank, found = len(shape_of(node)), {}
        for arg in args:
            value = arg.meta.get("val")
            if not isinstance(value, Tensor):
                raise Across
            at = place.dim - (rank - value.ndim)
            if at >= 0 and value.shape[at] != 1:
                found[arg] = Place(at, place.inner)
        return found


def _divisors(*bounds: int) -> Iterator[int]:
    return (n for n in range(1, max(bounds) + 1) if all(bound % n == 0 for bound in bounds if bound))


def _pointwise(node: fx.Node) -> bool:
    target: Any = node.target
    if target in LOSSES:
        at = LOSSES[target]
        return len(node.args) > at and node.args[at] == 0
    return torch.Tag.pointwise in target.tags or target in POINTWISE


def _position(node: fx.Node, name: str) -> int:
    target: Any = node.target
    return next(at for at, argument in enumerate(target._schema.arguments) if argument.name == name)


def _argument(node: fx.Node, name: str) -> Any:
    at = _position(node, name)
    if at < len(node.args):
        return node.args[at]
    target: Any = node.target
    return node.kwargs.get(name, target._schema.arguments[at].default_value)


def _dim(node: fx.Node) -> int:
    found = _argument(node, "dim")
    assert isinstance(found, int)
    return found
