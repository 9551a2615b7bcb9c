"""A tensor whose dimensions are known as axes, viewed with other dimensions of the same axes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from memopt.algebra.axes import ATEN, Axes, Dim, Dims, UnlikeError, shape_of
from memopt.forward import Forward


def placed(forward: Forward, like: fx.Node, axes: Axes, node: fx.Node, dims: Dims, target: Sequence[Dim]) -> fx.Node:
    """The node with the target's dimensions, at the graph's insertion point.

    A target dimension of which the node has no axis has size 1; one of which it has some is expanded to the others.
    Raises UnlikeError where the node has axes that the target lacks.
    """
    here = {leaf for dim in dims for leaf in axes.flat(dim)}
    return whole(forward, like, axes, node, dims, [group if here & set(axes.flat(group)) else () for group in target])


def whole(forward: Forward, like: fx.Node, axes: Axes, node: fx.Node, dims: Dims, target: Sequence[Dim]) -> fx.Node:
    """The same, expanded to all of the target's dimensions."""
    leaves = [leaf for dim in dims for leaf in axes.flat(dim)]
    groups = [axes.flat(dim) for dim in target]
    order = [leaf for group in groups for leaf in group]
    present = [leaf for leaf in order if leaf in leaves]
    if len(present) != len(leaves):
        raise UnlikeError
    node = _reshaped(forward, like, node, [axes.sizes[leaf] for leaf in leaves])
    moves = [leaves.index(leaf) for leaf in present]
    if moves != sorted(moves):
        node = forward.new(ATEN.permute.default, (node, moves), like)
    if len(present) < len(order):
        node = _reshaped(forward, like, node, [axes.sizes[leaf] if leaf in leaves else 1 for leaf in order])
        node = forward.new(ATEN.expand.default, (node, [axes.sizes[leaf] for leaf in order]), like)
    return _reshaped(forward, like, node, [axes.size(group) for group in groups])


def _reshaped(forward: Forward, like: fx.Node, node: fx.Node, shape: list[int]) -> fx.Node:
    return node if list(shape_of(node)) == shape else forward.new(ATEN.reshape.default, (node, shape), like)
