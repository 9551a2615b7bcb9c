"""Sums of products of two tensors, however spelled, in one form: what each dimension of each operand stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from memopt.algebra.axes import ATEN, Axes, Dims, shape_of

Labels = tuple[str, ...]
PRODUCTS = frozenset({ATEN.matmul.default, ATEN.bmm.default, ATEN.mm.default})


@dataclass(frozen=True)
class Contraction:
    """node = factor * sum of products of two operands (+ beta * added). A label stands for a dimension; labels that the
    result lacks are summed over.

    A dimension of size 1 may meet a longer one of its label: it is broadcast.
    """

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    labels: tuple[Labels, Labels]
    result: Labels
    added: fx.Node | None = None
    beta: float = 1.0
    factor: float = 1.0

    def size(self, label: str) -> int:
        """Of the label's dimension."""
        pairs = zip(self.operands, self.labels, strict=True)
        return max(n for node, labels in pairs for n, at in zip(shape_of(node), labels, strict=True) if at == label)

    def dims(self, axes: Axes) -> tuple[Dims, Dims, Dims]:
        """Dimensions of both operands and of the result, each label an axis of its own."""
        made = {label: axes.new(self.size(label)) for label in dict.fromkeys((*self.labels[0], *self.labels[1]))}
        first, second = (self.dims_of(at, made) for at in (0, 1))
        return first, second, tuple(made[label] for label in self.result)

    def dims_of(self, at: int, made: dict[str, tuple[int, ...]]) -> Dims:
        """Dimensions of an operand, given those of the labels."""
        pairs = zip(shape_of(self.operands[at]), self.labels[at], strict=True)
        return tuple(() if size == 1 else made[label] for size, label in pairs)


def contraction(node: fx.Node) -> Contraction | None:
    """The node in this form; None if it is no such sum."""
    args: Any = node.args
    if node.target in PRODUCTS:
        return _matmul(node, args[0], args[1])
    if node.target is ATEN.baddbmm.default:
        named = node.kwargs
        beta, alpha = (float(named.get(name, 1)) for name in ("beta", "alpha"))  # type: ignore[arg-type]
        found = _matmul(node, args[1], args[2])
        return found and Contraction(
            node,
            found.operands,
            found.labels,
            found.result,
            args[0] if beta else None,
            beta,
            alpha,
        )
    if node.target is ATEN.einsum.default and len(args[1]) == 2:
        return _einsum(node, args[0], args[1])
    return None


def _matmul(node: fx.Node, a: fx.Node, b: fx.Node) -> Contraction | None:
    ranks = len(shape_of(a)), len(shape_of(b))
    if min(ranks) < 2:
        return None
    batch = tuple(f"batch{at}" for at in range(max(ranks) - 2))
    left = (*batch[len(batch) + 2 - ranks[0] :], "row", "sum")
    right = (*batch[len(batch) + 2 - ranks[1] :], "sum", "column")
    return Contraction(node, (a, b), (left, right), (*batch, "row", "column"))


def _einsum(node: fx.Node, equation: str, operands: Sequence[fx.Node]) -> Contraction | None:
    given, arrow, result = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    if len(parts) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    left, right = (_letters(text, len(shape_of(operand))) for text, operand in zip(parts, operands, strict=True))
    rank = len(node.meta["val"].shape)
    out = _letters(result, rank) if arrow else _implied(left, right)
    if any(len(set(labels)) < len(labels) for labels in (left, right, out)):
        return None  # a diagonal
    alone = (set(left) ^ set(right)) - set(out)
    return None if alone else Contraction(node, (operands[0], operands[1]), (left, right), out)


def _letters(text: str, rank: int) -> Labels:
    """A label for each dimension; those of an ellipsis are numbered from its right end."""
    before, dots, after = text.partition("...")
    missing = rank - len(before) - len(after) if dots else 0
    return (*before, *(f"...{at}" for at in reversed(range(missing))), *after)


def _implied(left: Labels, right: Labels) -> Labels:
    """What an equation without an arrow gives: dots first, then the letters that stand once, in order."""
    dots = max((tuple(x for x in labels if "." in x) for labels in (left, right)), key=len)
    letters = [label for label in (*left, *right) if "." not in label]
    return (*dots, *sorted(letter for letter in letters if letters.count(letter) == 1))
