"""What is done to attention's scores, taken apart: fills of what is hidden, and what is added, each in its least form.

A mask over queries and keys is mostly conjunctions of masks that need less: one of distances (causal, a window), one of
keys (padding). Fills that are added (0 where seen, the dtype's least number elsewhere) are fills as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from memopt.algebra.axes import ATEN, CASTS, COPIES, EXPANDS, Axes, Dims
from memopt.algebra.constants import constant, number
from memopt.forward import written

LOW = -1e4  # a score so filled weighs nothing beside one that is not
BOTH = frozenset({ATEN.bitwise_and.Tensor, ATEN.logical_and.default})
EITHER = frozenset({ATEN.bitwise_or.Tensor, ATEN.logical_or.default})
NOT = frozenset({ATEN.bitwise_not.default, ATEN.logical_not.default})
FILLS = frozenset({ATEN.masked_fill.Scalar, ATEN.masked_fill.Tensor})
WHERES = frozenset({ATEN.where.self, ATEN.where.ScalarOther, ATEN.where.ScalarSelf, ATEN.where.Scalar})


@dataclass(frozen=True)
class Piece:
    """A tensor that broadcasts to scores whose dimensions, right-aligned, are `dims`.

    fill: what stands in the place of scores where it is false (true if `hides`); None: it is added, times `factor`.
    added: the fill stands for something that was added.
    """

    node: fx.Node
    dims: Dims
    fill: float | None = None
    hides: bool = False
    added: bool = False
    factor: float = 1.0

    def of(self, node: Any, **changes: Any) -> Piece:
        """An argument of the piece's node instead."""
        return replace(self, node=node, dims=_aligned(node, self.dims), **changes)


def _aligned(node: fx.Node, dims: Dims) -> Dims:
    """Dimensions of a tensor that broadcasts to these."""
    shape = node.meta["val"].shape
    kept = dims[len(dims) - len(shape) :]
    return tuple(() if size == 1 else dim for size, dim in zip(shape, kept, strict=True))


def pieces(axes: Axes, piece: Piece) -> Iterator[Piece]:
    """Its parts, in the order in which they act."""
    found = _parts(axes, piece)
    if found is None:
        if not _idle(piece):
            yield piece
        return
    for part in found:
        yield from pieces(axes, part)


def _parts(axes: Axes, piece: Piece) -> list[Piece] | None:
    """One step of taking apart; None where there is nothing to take apart."""
    node, target = piece.node, piece.node.target
    if written(node):
        return None
    if target in EXPANDS:
        source: Any = node.args[0]
        return [replace(piece, node=source, dims=axes.up(node, _padded(node, piece.dims)))]
    if target in COPIES or (target in CASTS and _same_kind(node)):
        return [piece.of(node.args[0])]
    return _fill_parts(piece) if piece.fill is not None else _added_parts(piece)


def _padded(node: fx.Node, dims: Dims) -> Dims:
    """One for each dimension of the node."""
    return dims[len(dims) - len(node.meta["val"].shape) :]


def _same_kind(node: fx.Node) -> bool:
    """Whether the cast leaves truth true, or numbers what they are but for rounding."""
    before: torch.dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    after: torch.dtype = node.meta["val"].dtype
    cut = before.is_floating_point and not after.is_floating_point
    return (before is torch.bool) == (after is torch.bool) and not cut


def _fill_parts(piece: Piece) -> list[Piece] | None:
    """What keeps is a conjunction; what hides, a disjunction."""
    args: tuple[Any, ...] = piece.node.args
    if piece.node.target in NOT and args[0].meta["val"].dtype is torch.bool:
        return [piece.of(args[0], hides=not piece.hides)]
    together = piece.node.target in (EITHER if piece.hides else BOTH)
    if together and all(arg.meta["val"].dtype is torch.bool for arg in args[:2]):
        return [piece.of(arg) for arg in args[:2]]
    return None


def _added_parts(piece: Piece) -> list[Piece] | None:
    args: tuple[Any, ...] = piece.node.args
    target = piece.node.target
    if target in (ATEN.add.Tensor, ATEN.sub.Tensor) and not piece.node.kwargs and _tensors(args):
        sign = 1.0 if target is ATEN.add.Tensor else -1.0
        return [piece.of(args[0]), piece.of(args[1], factor=sign * piece.factor)]
    if target is ATEN.mul.Tensor:
        for this, other in (args[:2], args[1::-1]):
            if isinstance(this, fx.Node) and (value := number(other)) is not None:
                return [piece.of(this, factor=value * piece.factor)]
    if target in WHERES:
        return _chosen(piece, args)
    if target in FILLS and (value := number(args[2])) is not None:
        return _filled(piece, args[0], args[1], value, hides=True)
    if target is ATEN.rsub.Scalar and args[1] == 1 and len(args) == 2:  # (1 - mask) * -1e4
        mask = args[0].args[0] if args[0].target in CASTS else None
        if isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool and piece.factor <= LOW:
            return [piece.of(mask, fill=piece.factor, added=True)]
    return None


def _tensors(args: tuple[Any, ...]) -> bool:
    """Whether both are more than a number."""
    return all(isinstance(arg, fx.Node) and number(arg) is None for arg in args[:2])


def _chosen(piece: Piece, args: tuple[Any, ...]) -> list[Piece] | None:
    """where(mask, 0, least), or the other way round."""
    mask, this, other = args
    for kept, value, hides in ((this, number(other), False), (other, number(this), True)):
        if value is not None and value * piece.factor <= LOW:
            return _filled(piece, kept, mask, value, hides)
    return None


def _filled(piece: Piece, kept: Any, mask: fx.Node, value: float, hides: bool) -> list[Piece] | None:
    """What is kept of an added tensor, then a fill of the rest."""
    if value * piece.factor > LOW:
        return None
    fill = piece.of(mask, fill=value * piece.factor, hides=hides, added=True)
    return [fill] if number(kept) == 0 or _zeros(kept) else [piece.of(kept), fill]


def _zeros(node: Any) -> bool:
    made = isinstance(node, fx.Node) and node.target in (ATEN.zeros.default, ATEN.zeros_like.default)
    return made and not written(node)


def _idle(piece: Piece) -> bool:
    """Whether it does nothing: constants that hide nothing, or zeros."""
    small = sum(bool(dim) for dim in piece.dims) <= 1
    found = constant(piece.node) if small else None
    if found is None:
        return False
    if piece.fill is not None:
        return not bool(found.any()) if piece.hides else bool(found.all())
    return not bool(found.any())
