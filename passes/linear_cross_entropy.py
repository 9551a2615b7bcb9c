"""A linear layer whose outputs only losses read becomes one operation that never holds those logits.

One cross-entropy to one number, of the products themselves, makes its gradients in the forward
(kernels/linear_cross_entropy.py). Whatever else is made of each row's sum of exponentials and of the logit of one word
reads those instead (kernels/linear_statistics.py): losses of each row, weighted classes, z-loss, log-probabilities of
chosen words, soft caps. Logits that the model also returns, detached, are made when somebody reads them
(memopt/later.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import memopt.kernels.linear_cross_entropy as whole
from memopt.algebra.axes import ATEN
from memopt.algebra.heads import (
    LOSSES,
    NORMALISED,
    SHAPES,
    SLICES,
    Found,
    Head,
    Path,
    Reader,
    found_at,
    head_of,
)
from memopt.facts import source_line
from memopt.forward import Forward, Later, constant, gives_gradient, trained
from memopt.kernels import logits
from memopt.passbase import Numerics, Refused, Rewrite, Site

LOGITS = 3  # tensors of their size that exist at once where a loss is made of logits and differentiated
BEGIN = (LOSSES[0], ATEN.logsumexp.default, NORMALISED)


def linear_cross_entropy(forward: Forward) -> tuple[Site, ...]:
    """Rewrite every place that gains by it and can be; name those that cannot."""
    sites: list[Site | None] = []
    seen: set[fx.Node] = set()  # a head is looked at once, for the first that reads it
    for node in forward.calls(*BEGIN):
        if node not in seen:
            sites.append(_site(forward, node, seen))
    return tuple(site for site in sites if site is not None)


def _site(forward: Forward, begin: fx.Node, seen: set[fx.Node]) -> Site | None:
    where = source_line(begin)
    try:
        head = head_of(begin)
    except Refused as why:
        return Site(where, refused=str(why)) if begin.target is LOSSES[0] else None
    if head.node in seen or not _gains(head):
        return None
    seen.add(head.node)
    read: Tensor = begin.args[0].meta["val"]  # type: ignore[union-attr]
    try:
        found = found_at(head)
        losses = [_loss(reader) for reader in found.readers]
        if not all(constant(loss.targets) for loss in losses if loss.targets is not None):
            raise Refused("targets are written into")
        if found.returned and not all(_given(node) for node in (head.weight, head.bias)):
            raise Refused("logits are returned, and the weight is no parameter")
    except Refused as why:
        return Site(where, refused=str(why))
    seen.update(found.nodes)
    _replace(forward, found.head, losses)
    _postpone(forward, found)
    _erase(forward, found.nodes)
    return Site(where, read.numel() * read.element_size())


def _gains(head: Head) -> bool:
    """Whether the operation takes less than logits do: as log-softmax, and as its gradient and what that is made of.

    It takes a chunk of them and makes the hidden state's gradient early. A classifier of a few classes gains nothing.
    """
    made: Tensor = head.node.meta["val"]
    words, width = head.weight.meta["val"].shape
    rows, itemsize = made.numel() // words, made.element_size()
    takes = logits.workspace_bytes(rows, words, width, itemsize, logits.CHUNK) + rows * width * itemsize
    return bool(takes < LOGITS * made.numel() * 4)  # losses compute in fp32


@dataclass(frozen=True)
class Loss:
    """What a reader makes of each row. targets: of the row's words; None where only the sum of exponentials is read."""

    reader: Reader
    targets: fx.Node | None = None
    ignored: int | None = None
    weight: fx.Node | None = None
    reduction: int = 0
    smoothing: float = 0.0

    @property
    def picks(self) -> tuple[fx.Node, int | None] | None:
        """Which words are chosen; None for none."""
        return None if self.targets is None else (self.targets, self.ignored)

    @property
    def at_once(self) -> bool:
        """Whether its gradients can be made in the forward: one number, of the products themselves."""
        one = self.reader.node.target is LOSSES[0] and self.reduction in (whole.MEAN, whole.SUM)
        return one and self.weight is None and not self.reader.path.bent


def _loss(reader: Reader) -> Loss:
    """What the reader makes. Refused where that is more than can be made of sums and chosen words."""
    node, args = reader.node, reader.node.args
    if node.target is ATEN.logsumexp.default:
        return Loss(reader)
    if node.target is ATEN.gather.default:
        return Loss(reader, args[2])  # type: ignore[arg-type]
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    defaults = {argument.name: argument.default_value for argument in node.target._schema.arguments}  # type: ignore[union-attr]
    given: dict[str, Any] = {**defaults, **dict(zip(names, args, strict=False)), **node.kwargs}
    smoothing = given.get("label_smoothing", 0.0)
    if given["weight"] is not None and smoothing:
        raise Refused("classes have weights, and labels are smoothed")
    if given["target"].meta["val"].is_floating_point() or given["self"].meta["val"].dim() != 2:
        raise Refused("targets are probabilities, or logits are no matrix")
    return Loss(reader, given["target"], given["ignore_index"], given["weight"], given["reduction"], smoothing)


def _given(node: fx.Node | None) -> bool:
    return node is None or node.op == "placeholder"


def _replace(forward: Forward, head: Head, losses: list[Loss]) -> None:
    """Every reader by what is made without logits."""
    order = {node: at for at, node in enumerate(forward.graph.nodes)}
    losses = sorted(losses, key=lambda loss: order[loss.reader.node])
    scaled = head.node.meta["val"].dtype is torch.float16  # losses are scaled so that gradients are not rounded to zero
    if len(losses) == 1 and losses[0].at_once and not scaled:
        _at_once(forward, head, losses[0])
    else:
        for group in _groups(losses, order):
            _by_statistics(forward, head, group)


def _erase(forward: Forward, nodes: frozenset[fx.Node]) -> None:
    """What was made of the logits, and them."""
    for node in reversed(forward.graph.nodes):
        if node in nodes and not node.users:
            forward.graph.erase_node(node)


def _at_once(forward: Forward, head: Head, loss: Loss) -> None:
    node = loss.reader.node
    with forward.graph.inserting_before(node):
        rows, weight, bias = _operands(forward, head, loss.reader.path)
        given = head.hidden, head.weight, head.bias
        wanted = [each is not None and gives_gradient(node) and trained(each) for each in given]
        args = (
            rows, weight, bias, loss.targets, loss.ignored, loss.smoothing, loss.reduction, node.meta["val"].dtype,
            wanted, logits.chunk_bytes(forward.chunks),
        )  # fmt: skip
        both = forward.new(torch.ops.memopt.linear_cross_entropy.default, args, node)
        new = forward.graph.call_function(operator.getitem, (both, 0))
        new.meta = {**node.meta, "val": both.meta["val"][0]}
    node.replace_all_uses_with(new)


def _groups(losses: list[Loss], order: dict[fx.Node, int]) -> list[list[Loss]]:
    """Losses that are made of one set of sums: of the same rows, bent alike, with one set of targets, which are there
    when the first of them runs."""
    groups: list[list[Loss]] = []
    for loss in losses:
        for group in groups:
            first, path = group[0].reader, loss.reader.path
            alike = (path.rows(), path.scale, path.cap) == (first.path.rows(), first.path.scale, first.path.cap)
            mine, theirs = loss.picks, next((each.picks for each in group if each.picks is not None), None)
            early = loss.targets is None or order[loss.targets] < order[first.node]
            if alike and (mine is None or mine == theirs or (theirs is None and early)):
                group.append(loss)
                break
        else:
            groups.append([loss])
    return groups


New = Callable[..., fx.Node]  # (operation, its arguments) -> a call of it at the graph's insertion point


def _like(forward: Forward, like: fx.Node) -> New:
    """Makes nodes with the source line of this one."""
    return lambda target, *args: forward.new(target, args, like)


def _by_statistics(forward: Forward, head: Head, losses: list[Loss]) -> None:
    """The losses of sums of exponentials and chosen logits, which one operation makes for all of them."""
    first = losses[0].reader
    chosen = next((loss for loss in losses if loss.targets is not None), losses[0])
    with forward.graph.inserting_before(first.node):
        new = _like(forward, first.node)
        places = None if chosen.targets is None else _places(new, chosen)
        args = (*_operands(forward, head, first.path), places, first.path.scale, first.path.cap)
        summed = any(loss.smoothing for loss in losses)
        chunk = logits.chunk_bytes(forward.chunks)
        several = new(torch.ops.memopt.linear_statistics.default, *args, summed, chunk)
        made = [forward.graph.call_function(operator.getitem, (several, at)) for at in range(3)]
        for at, node in enumerate(made):
            node.meta = {**several.meta, "val": several.meta["val"][at]}
    for loss in losses:
        node = loss.reader.node
        with forward.graph.inserting_before(node):
            new = _like(forward, node)
            value = _made(new, head, loss, made)
            if value.meta["val"].dtype != node.meta["val"].dtype:
                value = new(ATEN.to.dtype, value, node.meta["val"].dtype)
            if value.meta["val"].shape != node.meta["val"].shape:
                value = new(ATEN.reshape.default, value, list(node.meta["val"].shape))
        node.replace_all_uses_with(value)
    for node in reversed(made):
        if not node.users:
            forward.graph.erase_node(node)


def _places(new: New, loss: Loss) -> fx.Node:
    """(N,) targets, the first word's where the row is ignored."""
    assert loss.targets is not None
    flat = loss.targets
    if flat.meta["val"].dim() != 1:
        flat = new(ATEN.reshape.default, flat, [-1])
    if loss.ignored is None:
        return flat
    return new(ATEN.masked_fill.Scalar, flat, new(ATEN.eq.Scalar, flat, loss.ignored), 0)


def _made(new: New, head: Head, loss: Loss, made: list[fx.Node]) -> fx.Node:
    """What the loss is, of (lse, chosen, total)."""
    lse, chosen, total = made
    if loss.targets is None:
        return lse
    if loss.ignored is None:
        return new(ATEN.sub.Tensor, chosen, lse) if loss.reader.path.normalised else chosen
    kept = chosen
    if loss.smoothing:
        words = head.weight.meta["val"].shape[0]
        kept = new(ATEN.mul.Tensor, chosen, 1.0 - loss.smoothing)
        kept = new(ATEN.add.Tensor, kept, new(ATEN.mul.Tensor, total, loss.smoothing / words))
    each = new(ATEN.sub.Tensor, lse, kept)
    ignored = new(ATEN.eq.Scalar, loss.targets, loss.ignored)
    weights = None
    if loss.weight is not None:
        weights = new(ATEN.index_select.default, loss.weight, 0, _places(new, loss))
        weights = new(ATEN.masked_fill.Scalar, weights, ignored, 0)
        each = new(ATEN.mul.Tensor, each, weights)
    each = new(ATEN.masked_fill.Scalar, each, ignored, 0)
    if loss.reduction == 0:
        return each
    summed = new(ATEN.sum.default, each)
    if loss.reduction == whole.SUM:
        return summed
    count = new(ATEN.sum.default, new(ATEN.logical_not.default, ignored) if weights is None else weights)
    return new(ATEN.div.Tensor, summed, count)


def _operands(forward: Forward, head: Head, path: Path) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """(N, H), (V, H) and (V) of what the product multiplies, in the type it computes in."""
    dtype = head.node.meta["val"].dtype
    rows = _cast(forward, _rows(forward, head, path.nodes), dtype)
    return rows, _cast(forward, head.weight, dtype), head.bias and _cast(forward, head.bias, dtype)


def _cast(forward: Forward, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else forward.new(ATEN.to.dtype, (node, dtype), node)


def _rows(forward: Forward, head: Head, between: Iterable[fx.Node]) -> fx.Node:
    """The hidden state with the reshapes and slices done that the logits went through: (N, H)."""
    rows, width = head.hidden, head.hidden.meta["val"].shape[-1]
    for node in between:
        if node.target in SHAPES:
            rows = forward.new(ATEN.reshape.default, (rows, [*node.meta["val"].shape[:-1], width]), rows)
        elif node.target in SLICES:
            rows = forward.new(node.target, (rows, *node.args[1:]), rows)
    if rows.meta["val"].dim() == 2:
        return rows
    return forward.new(ATEN.reshape.default, (rows, [-1, width]), rows)


def _postpone(forward: Forward, found: Found) -> None:
    """Have the graph return the hidden state for logits that somebody may read later, and forget the logits."""
    head, output = found.head, forward.graph.output_node()
    inputs = forward.graph.find_nodes(op="placeholder")
    returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    ends = {node: path for node, path in found.returned}
    for at, node in enumerate(returned):
        if node in ends:
            value, path = node.meta["val"], ends[node]
            with forward.graph.inserting_before(node):
                returned[at] = forward.new(ATEN.detach.default, (head.hidden,), node)
            bias = None if head.bias is None else inputs.index(head.bias)
            forward.later[at] = Later(
                inputs.index(head.weight), bias, tuple(value.shape), value.dtype, head.node.meta["val"].dtype,
                path.scale, path.cap, path.bent_in,
            )  # fmt: skip
    output.args = (tuple(returned),)


@dataclass(frozen=True)
class LinearCrossEntropy(Rewrite):
    """Never hold logits. Assumes of one that is made in the forward, gradients too: a gradient reaches it alone."""

    name, numerics = "linear_cross_entropy", Numerics.REORDERED
    begins_at = ("cross_entropy", "logsumexp", "log_softmax")
    run = staticmethod(linear_cross_entropy)
