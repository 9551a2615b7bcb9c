"""Tensors over queries and keys whose elements depend on the distance between them alone, made of the distances.

Causal masks, sliding windows, ALiBi and relative positions compute, from numbered positions i (queries) and j (keys), a
function of j - i. The same operations, run on one row of all distances, - (Q - 1) to K - 1, make every value there is:
Q + K - 1 numbers instead of Q x K. Such tensors are found by what operations do to positions, however they are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memopt.algebra.axes import ATEN, CASTS, COPIES, EXPANDS, PERMUTES, REGROUPS, permutation
from memopt.algebra.constants import number
from memopt.forward import Forward, written

Places = tuple[int | None, int | None]  # a tensor's dimensions along queries and along keys
COMPARED: dict[Any, Any] = {
    **{ATEN.le.Tensor: ATEN.le.Scalar, ATEN.lt.Tensor: ATEN.lt.Scalar, ATEN.ge.Tensor: ATEN.ge.Scalar},
    **{ATEN.gt.Tensor: ATEN.gt.Scalar, ATEN.eq.Tensor: ATEN.eq.Scalar, ATEN.ne.Tensor: ATEN.ne.Scalar},
}
SUMS = {ATEN.add.Tensor: 1, ATEN.add.Scalar: 1, ATEN.sub.Tensor: -1, ATEN.sub.Scalar: -1}  # sign of what is added
FILLED = {ATEN.full.default: 0, ATEN.ones.default: 0, ATEN.zeros.default: 0}  # argument that is the shape
FILLED |= {ATEN.new_full.default: 1, ATEN.new_ones.default: 1, ATEN.new_zeros.default: 1}
LIKE = frozenset({ATEN.full_like.default, ATEN.ones_like.default, ATEN.zeros_like.default})
BROADCAST = frozenset({ATEN.where.ScalarOther, ATEN.where.ScalarSelf, ATEN.where.Scalar, ATEN.masked_fill.Tensor})
TRIANGLES: dict[Any, Any] = {ATEN.triu.default: ATEN.ge.Scalar, ATEN.tril.default: ATEN.le.Scalar}


@dataclass(frozen=True)
class Position:
    """The number by_query * i + by_key * j + start."""

    by_query: int
    by_key: int
    start: int

    @property
    def is_distance(self) -> bool:
        return self.by_key == -self.by_query != 0

    def plus(self, other: Position, sign: int) -> Position:
        return Position(
            self.by_query + sign * other.by_query, self.by_key + sign * other.by_key, self.start + sign * other.start
        )


@dataclass
class Distances:
    """Makes stand-ins, at the graph's insertion point, for tensors over queries and keys.

    A stand-in has the rank of what it stands for, size 1 along queries and Q + K - 1 along keys, where entry t is of
    distance t - (Q - 1). made: node -> its stand-in; None where there is none.
    """

    forward: Forward
    like: fx.Node
    queries: int
    keys: int
    made: dict[tuple[fx.Node, Places], fx.Node | None] = field(default_factory=dict)

    def of(self, node: fx.Node, places: Places) -> fx.Node | None:
        """The node's stand-in; itself if it has neither dimension; None if it depends on more than distances."""
        places = _present(node, places)
        if places == (None, None):
            return node
        if written(node):
            return None
        if (node, places) not in self.made:
            self.made[node, places] = self._made(node, places)
        return self.made[node, places]

    def _made(self, node: fx.Node, places: Places) -> fx.Node | None:
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return None  # an input
        if (position := self.position(node, places)) is not None:
            return self._row(node, places, position)
        if target in COMPARED and (gap := self._gap(node, places)) is not None:
            row = self._row(node.args[0], places, gap, node)  # type: ignore[arg-type]
            return None if row is None else self.forward.new(COMPARED[target], (row, 0), self.like)
        if target in TRIANGLES:
            return self._triangle(node, places)
        if target in FILLED:
            return self._filled(node, places)
        if target in REGROUPS | PERMUTES:
            return self._moved(node, places)
        if target in EXPANDS:
            return self._of_argument(node.args[0], node, places)
        if target is ATEN.embedding.default:
            return self._again(node, {1: places})
        if torch.Tag.pointwise in target.tags or target in CASTS | COPIES | LIKE | BROADCAST:
            return self._again(node, {at: _aligned(arg, node, places) for at, arg in enumerate(node.args)})
        return None

    # numbers of positions

    def position(self, node: fx.Node, places: Places) -> Position | None:
        """The node as numbers of positions, if it holds such."""
        target: Any = node.target if node.op == "call_function" else None
        if target in (ATEN.arange.default, ATEN.arange.start, ATEN.arange.start_step):
            return _counted(node, places)
        if target in SUMS and not node.kwargs:
            a, b = (self._side(arg, node, places) for arg in node.args[:2])
            return None if a is None or b is None else a.plus(b, SUMS[target])
        if target in REGROUPS | PERMUTES:
            before = _before(node, places)
            return None if before is None else self.position(node.args[0], before)  # type: ignore[arg-type]
        if target in CASTS | COPIES and node.meta["val"].dtype is not torch.bool:
            return self.position(node.args[0], places)  # type: ignore[arg-type]
        return None

    def _side(self, arg: Any, node: fx.Node, places: Places) -> Position | None:
        """An operand of the node as positions; a whole number is one that moves with neither."""
        if (value := number(arg)) is not None:
            return Position(0, 0, int(value)) if value == int(value) else None
        return self.position(arg, _aligned(arg, node, places)) if isinstance(arg, fx.Node) else None

    def _gap(self, node: fx.Node, places: Places) -> Position | None:
        """What a comparison compares with 0."""
        a, b = (self._side(arg, node, places) for arg in node.args[:2])
        return None if a is None or b is None else a.plus(b, -1)

    def _row(self, node: fx.Node, places: Places, position: Position, shaped: fx.Node | None = None) -> fx.Node | None:
        """Every number the positions make, one a distance, in the node's dtype and the rank of `shaped`."""
        if not position.is_distance:
            return None
        value, like = node.meta["val"], (shaped or node).meta["val"]
        first = position.start - position.by_key * (self.queries - 1)
        args = (first, first + position.by_key * self._count, position.by_key)
        flat = self.forward.new(ATEN.arange.start_step, args, self.like, dtype=value.dtype, device=value.device)
        shape = [self._count if at == places[1] else 1 for at in range(like.ndim)]
        return self.forward.new(ATEN.view.default, (flat, shape), self.like)

    @property
    def _count(self) -> int:
        return self.queries + self.keys - 1

    # operations on what stands for their arguments

    def _again(self, node: fx.Node, places: dict[int, Places]) -> fx.Node | None:
        """The node's operation on the stand-ins of its arguments at those numbers."""
        args = list(node.args)
        for at, where in places.items():
            if isinstance(arg := args[at], fx.Node):
                found = self.of(arg, where)
                if found is None:
                    return None
                args[at] = found
        return self.forward.new(node.target, tuple(args), self.like, **node.kwargs)  # type: ignore[arg-type]

    def _of_argument(self, arg: Any, node: fx.Node, places: Places) -> fx.Node | None:
        return self.of(arg, _aligned(arg, node, places))

    def _moved(self, node: fx.Node, places: Places) -> fx.Node | None:
        """A view that leaves both dimensions whole."""
        before = _before(node, places)
        source = None if before is None else self.of(node.args[0], before)  # type: ignore[arg-type]
        if source is None:
            return None
        if node.target in PERMUTES:
            return self.forward.new(node.target, (source, *node.args[1:]), self.like)
        return self.forward.new(ATEN.view.default, (source, self._shape(node, places)), self.like)

    def _shape(self, node: fx.Node, places: Places) -> list[int]:
        """Of the node's stand-in."""
        sizes = [1 if at == places[0] else size for at, size in enumerate(node.meta["val"].shape)]
        return [self._count if at == places[1] else size for at, size in enumerate(sizes)]

    def _filled(self, node: fx.Node, places: Places) -> fx.Node:
        """A constant, of size 1 along both."""
        shape = [1 if at in places else size for at, size in enumerate(node.meta["val"].shape)]
        target: Any = node.target
        args: list[Any] = list(node.args)
        args[FILLED[target]] = shape
        return self.forward.new(target, tuple(args), self.like, **node.kwargs)

    def _triangle(self, node: fx.Node, places: Places) -> fx.Node | None:
        """What is kept on one side of a diagonal, and 0 on the other."""
        rank = node.meta["val"].ndim
        source = self.of(node.args[0], places) if places == (rank - 2, rank - 1) else None  # type: ignore[arg-type]
        if source is None:
            return None
        diagonal: Any = node.args[1] if len(node.args) > 1 else 0
        device = node.meta["val"].device
        args = (1 - self.queries, self.keys, 1)
        row = self.forward.new(ATEN.arange.start_step, args, self.like, device=device)
        kept = self.forward.new(TRIANGLES[node.target], (row, diagonal), self.like)
        nothing = self.forward.new(ATEN.zeros_like.default, (source,), self.like)
        return self.forward.new(ATEN.where.self, (kept, source, nothing), self.like)


def _counted(node: fx.Node, places: Places) -> Position | None:
    """The numbers of an arange along one of the two dimensions."""
    if node.meta["val"].is_floating_point():
        return None
    numbers: Any = node.args if node.target is not ATEN.arange.default else (0, *node.args)
    start, step = int(numbers[0]), int(numbers[2]) if len(numbers) > 2 else 1
    if places == (0, None):
        return Position(step, 0, start)
    return Position(0, step, start) if places == (None, 0) else None


def _present(node: fx.Node, places: Places) -> Places:
    """Without dimensions of size 1, which stand along neither."""
    shape = node.meta["val"].shape
    query, key = (at if at is not None and shape[at] != 1 else None for at in places)
    return query, key


def _aligned(arg: Any, node: fx.Node, places: Places) -> Places:
    """Where an argument has the node's dimensions, as broadcasting aligns them."""
    if not isinstance(arg, fx.Node):
        return None, None
    value = arg.meta["val"]
    shift = node.meta["val"].ndim - value.ndim
    query, key = (None if at is None or at < shift or value.shape[at - shift] == 1 else at - shift for at in places)
    return query, key


def _before(node: fx.Node, places: Places) -> Places | None:
    """Where a view's argument has the dimensions; None where the view takes them apart."""
    source: Any = node.args[0]
    if node.target in PERMUTES:
        order = permutation(node)
        query, key = (None if at is None else order[at] for at in places)
        return query, key
    old, new = source.meta["val"].shape, node.meta["val"].shape
    if [size for size in old if size != 1] != [size for size in new if size != 1]:
        return None
    long = [at for at, size in enumerate(old) if size != 1]
    query, key = (None if at is None else long[sum(size != 1 for size in new[:at])] for at in places)
    return query, key
