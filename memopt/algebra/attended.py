"""A softmax read as attention: the product its scores are, what is done to them, and the product with the values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from memopt.algebra.axes import ATEN, CASTS, COPIES, EXPANDS, PERMUTES, REGROUPS, REPEATS, Axes, Dim, Dims, UnlikeError
from memopt.algebra.constants import number
from memopt.algebra.contraction import Contraction, contraction
from memopt.algebra.masks import FILLS, LOW, WHERES, Piece
from memopt.forward import written
from memopt.passbase import Refused

VIEWS = REGROUPS | PERMUTES | CASTS | COPIES


@dataclass(frozen=True)
class Operand:
    """A tensor and its dimensions."""

    node: fx.Node
    dims: Dims


@dataclass(frozen=True)
class Scores:
    """cap * tanh(scale / cap * product), or scale * product where cap is 0; then the pieces, in order."""

    product: Contraction
    dims: Dims  # of the product's result
    scale: float
    cap: float
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Attended:
    """softmax(scores) with dropout, times the values. along: the softmax's dimension, which keys and values have and
    queries lack. out: the second product; its result has out_dims."""

    axes: Axes
    softmax: fx.Node
    dims: Dims  # of the softmax
    along: Dim
    scores: Scores
    queries: Operand
    keys: Operand
    values: Operand
    dropout: float
    out: Contraction
    out_dims: Dims


def attended(softmax: fx.Node) -> Attended:
    """Raises Refused, or UnlikeError where dimensions cannot be told apart."""
    axes, value = Axes(), softmax.meta["val"]
    dims = tuple(axes.new(size) for size in value.shape)
    dim: Any = softmax.args[1]
    scores = _up(axes, _only(softmax.args[0]), dims, _Way())
    dropout, out, side, read = _down(axes, softmax, dims)
    made = dict(zip(out.labels[side], read, strict=True))
    _sized(axes, out, made)
    out_dims = tuple(made[label] if size != 1 else () for label, size in zip(out.result, _sizes(out.node), strict=True))
    values = Operand(out.operands[1 - side], out.dims_of(1 - side, made))
    queries, keys = _sides(axes, scores, set(axes.flat(dims[dim % value.ndim])))
    return Attended(
        axes, softmax, dims, dims[dim % value.ndim], scores, queries, _unrepeated(axes, keys),
        _unrepeated(axes, values), dropout, out, out_dims,
    )  # fmt: skip


def _sides(axes: Axes, scores: Scores, along: set[int]) -> tuple[Operand, Operand]:
    """(queries, keys) of the product that the scores are: keys have the softmax's dimension."""
    labels = dict(zip(scores.product.result, scores.dims, strict=True))
    _sized(axes, scores.product, labels)
    first, second = (Operand(scores.product.operands[at], scores.product.dims_of(at, labels)) for at in (0, 1))
    return (second, first) if along & set(axes.all(first.dims)) else (first, second)


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _sized(axes: Axes, product: Contraction, made: dict[str, Dim]) -> None:
    """Dimensions of labels that no result told: of what is summed over, or is the other operand's alone."""
    for label in (*product.labels[0], *product.labels[1]):
        if not made.get(label):
            made[label] = axes.new(product.size(label))


def _only(node: Any) -> fx.Node:
    """The node, which nothing else may read."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        raise Refused("its scores are read elsewhere")
    return node


@dataclass(frozen=True)
class _Way:
    """What lies between a place on the way up and the softmax. outer: product of the numbers since the cap."""

    outer: float = 1.0
    cap: float = 0.0
    pieces: tuple[Piece, ...] = ()

    @property
    def shifts(self) -> bool:
        """Whether a number added here is the same for every key in the end, and so nothing to the softmax."""
        return not self.cap and all(piece.fill is None or piece.fill <= LOW for piece in self.pieces)

    def scaled(self, by: float) -> _Way:
        return replace(self, outer=self.outer * by)

    def with_piece(self, piece: Piece) -> _Way:
        if self.cap:
            raise Refused("its scores are masked or biased before their soft cap")
        return replace(self, pieces=(piece, *self.pieces))


def _up(axes: Axes, node: fx.Node, dims: Dims, way: _Way) -> Scores:
    """The product behind the node, whose dimensions are `dims`."""
    product = contraction(node)
    if product is not None:
        return _scores(product, dims, way)
    target, args = node.target, node.args
    if target in VIEWS:
        return _up(axes, _only(args[0]), axes.up(node, dims), way)
    if target is ATEN.tanh.default and not way.cap and way.outer:
        return _up(axes, _only(args[0]), dims, replace(way, cap=way.outer, outer=1.0))
    if target is ATEN.neg.default:
        return _up(axes, _only(args[0]), dims, way.scaled(-1.0))
    for factor, this in _scalings(node):
        return _up(axes, _only(this), dims, way.scaled(factor))
    refusal = Refused(f"its scores go through {target}")
    for this, found in _sums(node, dims, way):
        try:
            return _up(axes, _only(this), _same(this, node, dims), found)
        except (Refused, UnlikeError) as why:
            refusal = why if isinstance(why, Refused) else refusal
    raise refusal


def _scores(product: Contraction, dims: Dims, way: _Way) -> Scores:
    if product.added is not None:
        way = way.with_piece(Piece(product.added, dims, factor=way.outer * product.beta).of(product.added))
    scale = way.outer * product.factor
    return Scores(product, dims, scale * way.cap if way.cap else scale, way.cap, way.pieces)


def _scalings(node: fx.Node) -> Iterator[tuple[float, Any]]:
    """(number, tensor) of a product or quotient with a number."""
    if node.target is ATEN.mul.Tensor:
        for this, other in (node.args[:2], node.args[1::-1]):
            if (value := number(other)) is not None:
                yield value, this
    elif node.target is ATEN.div.Tensor and (value := number(node.args[1])):
        yield 1.0 / value, node.args[0]


def _sums(node: fx.Node, dims: Dims, way: _Way) -> Iterator[tuple[Any, _Way]]:
    """(what may hold the product, the way down from it) of a sum, a fill, or a choice."""
    target, args = node.target, node.args
    piece = Piece(node, dims)
    if target in (ATEN.add.Tensor, ATEN.sub.Tensor) and not node.kwargs:
        sign = -1.0 if target is ATEN.sub.Tensor else 1.0
        if number(args[1]) is not None:
            if way.shifts:
                yield args[0], way
        elif isinstance(args[1], fx.Node):
            yield args[0], way.with_piece(piece.of(args[1], factor=sign * way.outer))
            yield args[1], way.scaled(sign).with_piece(piece.of(args[0], factor=way.outer))
    elif target in FILLS and (value := number(args[2])) is not None:
        yield args[0], way.with_piece(piece.of(args[1], fill=value * way.outer, hides=True))
    elif target in WHERES:
        for this, other, hides in ((args[1], args[2], False), (args[2], args[1], True)):
            if (value := number(other)) is not None:
                yield this, way.with_piece(piece.of(args[0], fill=value * way.outer, hides=hides))


def _same(this: Any, node: fx.Node, dims: Dims) -> Dims:
    """The node's dimensions, for an argument of the same shape."""
    if not isinstance(this, fx.Node) or _sizes(this) != _sizes(node):
        raise Refused("its mask is larger than its scores")
    return dims


def _down(axes: Axes, node: fx.Node, dims: Dims) -> tuple[float, Contraction, int, Dims]:
    """(dropout, the product with the values, which operand is the probabilities, their dimensions there)."""
    dropout = 0.0
    while True:
        if len(node.users) != 1:
            raise Refused("its probabilities are read elsewhere")
        before, node = node, next(iter(node.users))
        product = contraction(node)
        if product is not None and before in product.operands and product.operands[0] is not product.operands[1]:
            return dropout, product, product.operands.index(before), dims
        if node.target is ATEN.dropout.default and not dropout:
            dropout = float(node.args[1]) if node.args[2] else 0.0  # type: ignore[arg-type]
            if dropout >= 1:
                raise Refused("all of its probabilities are dropped")
        elif node.target in VIEWS and node.args[0] is before:
            dims = axes.down(node, dims)
        else:
            raise Refused(f"its probabilities go to {node.target}")


def _unrepeated(axes: Axes, operand: Operand) -> Operand:
    """What the operand repeats, where it repeats heads; itself elsewhere."""
    node, dims, best = operand.node, operand.dims, operand
    while node.target in REGROUPS | PERMUTES | COPIES | EXPANDS | REPEATS and not written(node):
        try:
            dims = axes.up(node, dims)
        except UnlikeError:
            break
        repeats, node = node.target in EXPANDS | REPEATS, node.args[0]  # type: ignore[assignment]
        best = Operand(node, dims) if repeats else best
    return best


def dtype_of(product: Contraction) -> torch.dtype:
    """What it is computed in: under autocast, not that of its operands."""
    found: torch.dtype = product.node.meta["val"].dtype
    return found
