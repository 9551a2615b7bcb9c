"""Which dimension of each tensor runs along the rows that a computation treats one by one.

A row is what stands at one number of an axis, say a position of a sequence. A node is rowwise where each row of its
result is made of the same row of some arguments and of other arguments as a whole: products with a weight, what is
pointwise, norms and reductions within a row. Attention is not, but where a row is a sequence of a batch. Such nodes may
run on a few rows at a time. A sum or mean over the rows may as well, if what a few rows give is added up; then nothing
else may read it among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
LOSSES = frozenset({ATEN.mse_loss.default, ATEN.kl_div.default, ATEN.l1_loss.default})
LOSSES |= {ATEN.smooth_l1_loss.default, ATEN.huber_loss.default}
MEANS = frozenset({ATEN.mean.default, ATEN.mean.dim})
SUMS = frozenset({ATEN.sum.default, ATEN.sum.dim_IntList})
MEAN = 1  # torch's number of that reduction


class Across(Exception):  # no error: what is asked is not so
    """Rows of the result are made of several rows, or nobody knows."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's rows are: its dimension `dim`, of outer x rows x inner elements."""

    dim: int
    inner: int = 1


@dataclass(frozen=True)
class Summed:
    """A sum over the rows, which lie there in what is summed; or their mean."""

    at: Place
    mean: bool


Known = dict[fx.Node, Place]
Found = dict[fx.Node, Place | Summed]


@dataclass(frozen=True)
class Rows:
    """A computation of `count` rows."""

    count: int

    def read(self, node: fx.Node, place: Place | Summed) -> Known:
        """Where the rows of the node's arguments are, given those of its result; arguments left out are read whole.

        For a node that makes several tensors, all of them have their rows there. Raises Across.
        """
        target: Any = node.target
        if isinstance(place, Summed):
            return dict.fromkeys(_summed(node), place.at)
        if is_getitem(node) or target in CASTS | COPIES:
            return {node.args[0]: place}  # type: ignore[dict-item]
        if not isinstance(target, torch._ops.OpOverload):
            raise Across
        for targets, rule in RULES:
            if target in targets:
                return rule(self, node, place)
        if (product := contraction(node)) is not None and product.added is None:
            return self._product(product, place)
        if _pointwise(node):
            return self._aligned(node, place)
        raise Across

    def _regroups(self, node: fx.Node, place: Place) -> Known:
        source: Any = node.args[0]
        return {source: self.regrouped(place, shape_of(node), shape_of(source))}

    def _permutes(self, node: fx.Node, place: Place) -> Known:
        return {node.args[0]: Place(permutation(node)[place.dim], place.inner)}  # type: ignore[dict-item]

    def _last(self, node: fx.Node, place: Place) -> Known:
        """What makes a last dimension of its own: a linear layer of its input, an embedding of its indices."""
        source: Any = node.args[node.target is ATEN.embedding.default]
        return {source: self._kept(place, shape_of(node), {len(shape_of(node)) - 1})}

    def _addmm(self, node: fx.Node, place: Place) -> Known:
        if place.dim != 0 or len(shape_of(node.args[0])) > 1:  # type: ignore[arg-type]
            raise Across
        return {node.args[1]: place}  # type: ignore[dict-item]

    def _along(self, node: fx.Node, place: Place) -> Known:
        """What works along one dimension, which stays."""
        source: Any = node.args[0]
        return {source: self._kept(place, shape_of(source), {_dim(node) % len(shape_of(source))})}

    def _norm(self, node: fx.Node, place: Place) -> Known:
        source: Any = node.args[0]
        rank, last = len(shape_of(source)), len(node.args[1])  # type: ignore[arg-type]
        return {source: self._kept(place, shape_of(source), set(range(rank - last, rank)))}

    def _attention(self, node: fx.Node, place: Place) -> Known:
        """What attends within each sequence of a batch, of the same heads or of keys' fewer ones."""
        given = [_argument(node, name) for name in ("query", "key", "value")]
        rank, mask = len(shape_of(given[0])), _argument(node, "attn_mask")
        if place.dim != 0 or rank < 3 or len({shape_of(arg)[0] for arg in given}) > 1:
            raise Across
        found = dict.fromkeys(given, place)
        by_rows = mask is not None and len(shape_of(mask)) == rank and shape_of(mask)[0] != 1
        return {**found, mask: place} if by_rows else found

    def _cat(self, node: fx.Node, place: Place) -> Known:
        parts: Any = node.args[0]
        self._kept(place, shape_of(node), {_dim(node) % len(shape_of(node))})
        return dict.fromkeys(parts, place)

    def made(self, node: fx.Node, known: Found) -> Place | Summed | None:
        """Where the rows of the node's result are, given those of arguments; None if it reads no rows.

        Arguments that nobody knows of may have rows as well. Raises Across.
        """
        told: Known = {}
        for arg in node.all_input_nodes:
            if isinstance(place := known.get(arg), Place):
                told[arg] = place
        if not told:
            return None
        if (summed := self._sum(node, told)) is not None:
            return summed
        for place in self._candidates(node, {each.inner for each in told.values()}):
            try:
                read = self.read(node, place)
            except Across:
                continue
            if all(read.get(arg) == at for arg, at in told.items()):
                return place
        raise Across

    def _sum(self, node: fx.Node, told: Known) -> Summed | None:
        """What the node makes if it sums over the rows of all that it reads, which lie alike."""
        places, over = set(told.values()), _summed(node)
        if not over or len(places) > 1 or not set(told) <= set(over):
            return None
        (place,) = places
        dims = _argument(node, "dim") if node.target in (ATEN.mean.dim, ATEN.sum.dim_IntList) else None
        rank = len(shape_of(over[0]))
        if dims and place.dim not in {dim % rank for dim in dims}:
            return None
        return Summed(place, node.target in MEANS or (node.target in LOSSES and _argument(node, "reduction") == MEAN))

    def _candidates(self, node: fx.Node, inner: set[int]) -> Iterator[Place]:
        value = node.meta.get("val")
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        for dim, size in enumerate(first.shape if isinstance(first, Tensor) else ()):
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

    def _reduced(self, node: fx.Node, place: Place) -> Known:
        source: Any = node.args[0]
        rank, given = len(shape_of(source)), _argument(node, "dim")
        if given is None or given == []:
            raise Across
        gone = {dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])}
        left = list(range(rank)) if _argument(node, "keepdim") else [at for at in range(rank) if at not in gone]
        return {source: self._kept(Place(left[place.dim], place.inner), shape_of(source), gone)}

    def _aligned(self, node: fx.Node, place: Place) -> Known:
        """Arguments that have the result's rows, as broadcasting aligns them."""
        rank, found = len(shape_of(node)), {}
        for arg in node.all_input_nodes:
            value = arg.meta.get("val")
            if not isinstance(value, Tensor):
                raise Across
            at = place.dim - (rank - value.ndim)
            if at >= 0 and value.shape[at] != 1:
                found[arg] = Place(at, place.inner)
        return found


RULES: tuple[tuple[frozenset[Any], Callable[[Rows, fx.Node, Place], Known]], ...] = (
    (REGROUPS, Rows._regroups),
    (PERMUTES, Rows._permutes),
    (frozenset({ATEN.linear.default, ATEN.embedding.default}), Rows._last),
    (frozenset({ATEN.addmm.default}), Rows._addmm),
    (PARTS | WITHIN, Rows._along),
    (NORMS, Rows._norm),
    (REDUCTIONS, Rows._reduced),
    (frozenset({ATEN.cat.default}), Rows._cat),
    (frozenset({ATEN.scaled_dot_product_attention.default}), Rows._attention),
    (EXPANDS, Rows._aligned),
)


def _summed(node: fx.Node) -> tuple[fx.Node, ...]:
    """What the node sums over more than each row's own, element by element; nothing if it does no such thing."""
    args: Any = node.args
    if node.target in MEANS | SUMS:
        return (args[0],)
    alike = node.target in LOSSES and shape_of(args[0]) == shape_of(args[1])
    return (args[0], args[1]) if alike and _argument(node, "reduction") else ()


def _divisors(*bounds: int) -> Iterator[int]:
    return (n for n in range(1, max(bounds) + 1) if all(bound % n == 0 for bound in bounds if bound))


def _pointwise(node: fx.Node) -> bool:
    target: Any = node.target
    if target in LOSSES:
        return not _argument(node, "reduction")
    return bool(torch.Tag.pointwise in target.tags or target in POINTWISE)


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
