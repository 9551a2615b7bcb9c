"""softmax(scale * q k' + what is done to scores) v becomes one operation that holds no tensor of queries by keys.

Found by its algebra: from each softmax up to the product that the scores are, and down to the product with the values,
through whatever views, casts, numbers, masks and biases stand between (memopt/algebra). It becomes torch's
scaled_dot_product_attention where that takes no square mask, and memopt's chunked attention elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

import memopt.kernels.chunked_attention  # noqa: F401  # registers the operation
from memopt.algebra.attended import Attended, attended, dtype_of
from memopt.algebra.axes import ATEN, Dim, UnlikeError
from memopt.algebra.distances import Distances
from memopt.algebra.masks import pieces
from memopt.algebra.placing import placed, whole
from memopt.algebra.terms import Maker, Terms
from memopt.facts import source_line
from memopt.forward import OFF, Forward, constant
from memopt.passbase import Numerics, Refused, Rewrite, Site

FEW = 1 << 13  # scores of a sample: held as they are, they cost less than a call for each sample
SEEDS = 1 << 62
CHUNKED = torch.ops.memopt.chunked_attention.default


@dataclass(frozen=True)
class Layout:
    """Which axes each dimension of the operation is made of; heads: of a group, which reads one head of k and v."""

    samples: Dim
    groups: Dim
    heads: Dim
    queries: Dim
    keys: Dim
    width: Dim
    value_width: Dim

    @property
    def all_heads(self) -> Dim:
        return (*self.groups, *self.heads)

    @property
    def scores(self) -> tuple[Dim, Dim, Dim, Dim]:
        return self.samples, self.all_heads, self.queries, self.keys


def run(forward: Forward) -> tuple[Site, ...]:
    """Every softmax between two products."""
    softmaxes = forward.calls(ATEN.softmax.int, ATEN._softmax.default)
    rows: dict[tuple[int, int], Distances] = {}  # masks are the same in every layer: so are the rows made of them
    return tuple(_site(forward, softmax, rows) for softmax in softmaxes)


def _site(forward: Forward, softmax: fx.Node, rows: dict[tuple[int, int], Distances]) -> Site:
    source = source_line(softmax)
    try:
        found = attended(softmax)
        layout = _layout(found)
        if len({OFF in node.meta for node in _between(found)}) > 1:
            raise Refused("gradients are switched off for a part of it")
        with forward.graph.inserting_before(found.out.node):
            _replace(forward, found, layout, rows)
    except Refused as why:
        return Site(source, refused=str(why))
    except UnlikeError:
        return Site(source, refused="its dimensions are merged so that they cannot be told apart")
    value = softmax.meta["val"]
    return Site(source, value.numel() * value.element_size())


def _between(found: Attended) -> Iterator[fx.Node]:
    """What computes it of queries, keys, values, masks and biases."""
    pieces = (piece.node for piece in found.scores.pieces)
    seen = {found.queries.node, found.keys.node, found.values.node, *pieces}
    waiting = [found.out.node]
    while waiting:
        node = waiting.pop()
        if node not in seen and node.op == "call_function":
            yield node
            waiting.extend(node.all_input_nodes)
        seen.add(node)


def _layout(found: Attended) -> Layout:
    """Raises Refused where the products are no attention."""
    flat, every = found.axes.flat, found.axes.all
    keys, scores = flat(found.along), every(found.dims)
    q, k, v = (every(operand.dims) for operand in (found.queries, found.keys, found.values))
    if set(keys) & set(q) or not set(keys) <= set(k) or not set(keys) <= set(v):
        raise Refused("its softmax does not run over what the values are summed over")
    rest = [axis for axis in scores if axis not in keys]
    shared = [axis for axis in rest if axis in k or axis in v]
    alone = [axis for axis in rest if axis not in shared]
    queries = next((dim for dim in map(flat, reversed(found.dims)) if dim and set(dim) <= set(alone)), ())
    if not queries or not set(alone) <= set(q):
        raise Refused("its scores have no queries of their own")
    heads = tuple(axis for axis in alone if axis not in queries)
    width, value_width = (tuple(axis for axis in each if axis not in scores) for each in (q, v))
    return Layout(tuple(shared[:-1]), tuple(shared[-1:]), heads, queries, keys, width, value_width)


def _replace(forward: Forward, found: Attended, layout: Layout, rows: dict[tuple[int, int], Distances]) -> None:
    axes, like, out = found.axes, found.softmax, found.out.node
    queries, keys = (axes.size(dim) for dim in (layout.queries, layout.keys))
    distances = rows.setdefault((queries, keys), Distances(forward, like, queries, keys))
    parts = [each for piece in found.scores.pieces for each in pieces(axes, piece)]
    terms = Maker(forward, like, axes, layout.scores, distances).terms(parts)
    q, k, v = _operands(forward, found, layout)
    if not all(
        map(constant, (found.queries.node, found.keys.node, found.values.node, *(piece.node for piece in parts)))
    ):
        raise Refused("it reads a tensor that is written into")
    call = _whole(forward, found, terms, (q, k, v))
    if call is None:
        if queries * keys * axes.size(layout.all_heads) < FEW:
            raise Refused("so few scores cost less than calls for their chunks")
        call = _chunked(forward, found, terms, (q, k, v))
    dims = (layout.samples, layout.all_heads, layout.queries, layout.value_width)
    out.replace_all_uses_with(placed(forward, like, axes, call, dims, found.out_dims))
    _erase(forward, out)


def _operands(forward: Forward, found: Attended, layout: Layout) -> tuple[fx.Node, fx.Node, fx.Node]:
    """(B, H, Q, E), (B, G, K, E), (B, G, K, D)."""
    each = (layout.samples, layout.groups, layout.keys)
    wanted = (
        (found.queries, (layout.samples, layout.all_heads, layout.queries, layout.width), found.scores.product),
        (found.keys, (*each, layout.width), found.scores.product),
        (found.values, (*each, layout.value_width), found.out),
    )
    made = []
    for operand, target, product in wanted:
        node = whole(forward, found.softmax, found.axes, operand.node, operand.dims, target)
        dtype = dtype_of(product)
        made.append(node if node.meta["val"].dtype == dtype else forward.new(ATEN.to.dtype, (node, dtype), node))
    return made[0], made[1], made[2]


def _whole(forward: Forward, found: Attended, terms: Terms, given: tuple[fx.Node, fx.Node, fx.Node]) -> fx.Node | None:
    """torch's own operation, where its fused kernels take it without a mask of queries by keys; None elsewhere."""
    q, k, v = (node.meta["val"] for node in given)
    plain = not found.dropout and not found.scores.cap and q.dtype == k.dtype == v.dtype and q.shape[3] == v.shape[3]
    causal = terms.window.bounded
    if causal and (terms.window.left is not None or terms.window.right or q.shape[2] != k.shape[2] or terms.nodes):
        return None
    if not plain or terms.trained or not all(_of_keys(terms, at) for at in range(len(terms.nodes))):
        return None
    mask = _key_mask(forward, found.softmax, terms, q.dtype)
    args = (*given, mask, 0.0, causal)
    named = {"scale": found.scores.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    return forward.new(ATEN.scaled_dot_product_attention.default, args, found.softmax, **named)


def _of_keys(terms: Terms, at: int) -> bool:
    """Whether the term is the same for every query, and a fill is one that is added or leaves nothing."""
    node, fill = terms.nodes[at], terms.fills[at]
    same = node.meta["val"].shape[2] == 1 and not terms.by_distance[at]
    return bool(same and (node.meta["val"].dtype is not torch.bool or terms.added[at] or fill == -math.inf))


def _key_mask(forward: Forward, like: fx.Node, terms: Terms, dtype: torch.dtype) -> fx.Node | None:
    """The sum of terms that are of keys alone; a fill is its number where it hides, and 0 elsewhere."""
    total: fx.Node | None = None
    for node, fill in zip(terms.nodes, terms.fills, strict=True):
        if node.meta["val"].dtype is torch.bool:
            zero = forward.new(ATEN.zeros_like.default, (node,), like, dtype=dtype)
            hidden = forward.new(ATEN.logical_not.default, (node,), like)
            node = forward.new(ATEN.masked_fill.Scalar, (zero, hidden, _within(fill, dtype)), like)
        elif node.meta["val"].dtype != dtype:
            node = forward.new(ATEN.to.dtype, (node, dtype), like)
        total = node if total is None else forward.new(ATEN.add.Tensor, (total, node), like)
    return total


def _within(fill: float, dtype: torch.dtype) -> float:
    """The fill in a type that may not reach so far."""
    return fill if fill == -math.inf else max(fill, torch.finfo(dtype).min)


def _chunked(forward: Forward, found: Attended, terms: Terms, given: tuple[fx.Node, fx.Node, fx.Node]) -> fx.Node:
    like = found.softmax
    seed = None
    if found.dropout:
        device = like.meta["val"].device
        seed = forward.new(ATEN.randint.default, (SEEDS, [1]), like, dtype=torch.int64, device=device)
    window = terms.window
    args = (
        *given, terms.nodes, terms.fills, terms.by_distance, terms.added, terms.trained, window.left, window.right,
        window.fill, window.added, found.scores.scale, found.scores.cap, found.dropout, seed,
    )  # fmt: skip
    return forward.new(CHUNKED, args, like)


def _erase(forward: Forward, node: fx.Node) -> None:
    """The node and what nothing else reads."""
    waiting = {node}
    while waiting:
        dead = max(waiting)
        waiting.remove(dead)
        if not dead.users and dead.op in ("call_function", "get_attr"):
            waiting |= set(dead.all_input_nodes)
            forward.graph.erase_node(dead)


@dataclass(frozen=True)
class Attention(Rewrite):
    """Never hold scores. Dropout is drawn anew: the same distribution, other numbers."""

    name, numerics, begins_at = "attention", Numerics.REORDERED, ("softmax",)
    run = staticmethod(run)
