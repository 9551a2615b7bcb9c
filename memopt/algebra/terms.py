"""What is done to scores as chunked attention takes it: terms that fit scores by broadcasting, rows of distances, and a
window."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from memopt.algebra.axes import ATEN, Axes, Dim, Dims
from memopt.algebra.constants import constant
from memopt.algebra.distances import Distances
from memopt.algebra.masks import LOW, Piece
from memopt.algebra.placing import placed
from memopt.forward import Forward, trained


@dataclass(frozen=True)
class Window:
    """Query i sees keys i - left to i + right (None: no bound); fill, added: of the scores beyond, as in Piece."""

    left: int | None = None
    right: int | None = None
    fill: float = -math.inf
    added: bool = False

    @property
    def bounded(self) -> bool:
        return self.left is not None or self.right is not None

    def within(self, other: Window) -> Window:
        """What both see."""
        if not self.bounded:
            return other
        left, right = (_least(a, b) for a, b in ((self.left, other.left), (self.right, other.right)))
        return Window(left, right, min(self.fill, other.fill), self.added or other.added)

    def leaves_each(self, queries: int, keys: int) -> bool:
        """Whether every query sees a key."""
        left = math.inf if self.left is None else self.left
        right = math.inf if self.right is None else self.right
        return all(max(0, i - left) <= min(keys - 1, i + right) for i in (0, queries - 1))


def _least(a: int | None, b: int | None) -> int | None:
    return min((each for each in (a, b) if each is not None), default=None)


@dataclass
class Terms:
    """Arguments of memopt::chunked_attention, in order. square: of queries by keys, which somebody made and holds."""

    nodes: list[fx.Node] = field(default_factory=list)
    fills: list[float] = field(default_factory=list)
    by_distance: list[bool] = field(default_factory=list)
    added: list[bool] = field(default_factory=list)
    window: Window = field(default_factory=Window)
    square: list[fx.Node] = field(default_factory=list)

    @property
    def trained(self) -> list[int]:
        return [at for at, node in enumerate(self.nodes) if node.meta["val"].is_floating_point() and trained(node)]

    def add(self, node: fx.Node, piece: Piece, by_distance: bool) -> None:
        self.nodes.append(node)
        self.fills.append(0.0 if piece.fill is None else piece.fill)
        self.by_distance.append(by_distance)
        self.added.append(piece.added)


@dataclass(frozen=True)
class Maker:
    """Makes terms at the graph's insertion point. scores: axes of (samples, heads, queries, keys)."""

    forward: Forward
    like: fx.Node
    axes: Axes
    scores: tuple[Dim, Dim, Dim, Dim]
    distances: Distances

    def terms(self, pieces: Iterable[Piece]) -> Terms:
        """Of the pieces, in their order."""
        found = Terms()
        for piece in pieces:
            self._add(found, piece)
        return found

    def _add(self, found: Terms, piece: Piece) -> None:
        dims = tuple(self.axes.flat(dim) for dim in piece.dims)
        queries, keys = (self.axes.flat(dim) for dim in self.scores[2:])
        if queries not in dims or keys not in dims:
            found.add(self._placed(piece.node, dims, self.scores, piece), piece, False)
            return
        places = dims.index(queries), dims.index(keys)
        row = self.distances.of(piece.node, places)
        if row is None:
            found.square.append(piece.node)
            found.add(self._placed(piece.node, dims, self.scores, piece), piece, False)
            return
        if (window := self._window(row, piece)) is not None:
            found.window = found.window.within(window)
            return
        self._add_row(found, row, dims, places, piece)

    def _add_row(self, found: Terms, row: fx.Node, dims: Dims, places: tuple[int, int], piece: Piece) -> None:
        count = row.meta["val"].shape[places[1]]
        along = self.axes.new(count)
        here = tuple(() if at == places[0] else along if at == places[1] else dim for at, dim in enumerate(dims))
        target = (*self.scores[:2], (), along)
        found.add(self._placed(row, here, target, piece), piece, count != 1)

    def _placed(self, node: fx.Node, dims: Dims, target: tuple[Dim, ...], piece: Piece) -> fx.Node:
        """In the target's dimensions, true where a score is kept, or times its factor."""
        made = placed(self.forward, self.like, self.axes, node, dims, target)
        if piece.hides:
            return self.forward.new(ATEN.logical_not.default, (made,), self.like)
        if piece.fill is None and piece.factor != 1.0:
            return self.forward.new(ATEN.mul.Tensor, (made, piece.factor), self.like)
        return made

    def _window(self, row: fx.Node, piece: Piece) -> Window | None:
        """The piece as a window, if it is a constant that is one."""
        value = constant(row)
        if value is None or value.numel() != self.distances.queries + self.distances.keys - 1:
            return None
        filled = _as_fill(value.flatten(), piece)
        return None if filled is None else _band(*filled, self.distances.queries, self.distances.keys)


def _as_fill(value: Tensor, piece: Piece) -> tuple[Tensor, Piece] | None:
    """(where scores are kept, the piece as a fill); None for numbers that are not 0 or one of the least."""
    if piece.fill is not None:
        return (value == 0) if piece.hides else (value != 0), piece
    filled = value[value != 0].unique() * piece.factor
    if len(filled) != 1 or not filled[0] <= LOW:
        return None
    return value == 0, replace(piece, fill=float(filled[0]), added=True)


def _band(kept: Tensor, piece: Piece, queries: int, keys: int) -> Window | None:
    """One run of distances that leaves each query a key; None if it is no such."""
    seen = torch.nonzero(kept).flatten().tolist()
    if not seen or len(seen) != seen[-1] - seen[0] + 1 or piece.fill is None or piece.fill > LOW:
        return None
    left, right = queries - 1 - seen[0], seen[-1] - (queries - 1)
    window = Window(
        None if left == queries - 1 else left, None if right == keys - 1 else right, piece.fill, piece.added
    )
    return window if window.leaves_each(queries, keys) else None
