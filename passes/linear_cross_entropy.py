"""A linear layer whose outputs only a cross-entropy reads becomes one operation that never holds those logits.

Found on the normalised forward: cross_entropy_loss of a product with a weight, with casts, reshapes and slices of rows
between them. Logits that the model also returns, detached, are made when somebody reads them (memopt/later.py).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import memopt.kernels.linear_cross_entropy as kernel
from memopt.facts import source_line
from memopt.forward import Forward, Later, trained
from memopt.passbase import Numerics, Rewrite, Site

ATEN = torch.ops.aten
CASTS = (ATEN.to.dtype, ATEN.to.dtype_layout, ATEN._to_copy.default, ATEN.to.device)
SAME = (ATEN.contiguous.default, ATEN.alias.default, ATEN.clone.default)
SHAPES = (ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default, ATEN.flatten.using_ints)
TURNS = (ATEN.t.default, ATEN.transpose.int, ATEN.permute.default, ATEN.numpy_T.default)
LOGITS = 3  # tensors of their size that exist at once where a loss is made of logits and differentiated
DEFAULTS: dict[str, Any] = {"weight": None, "reduction": kernel.MEAN, "ignore_index": -100, "label_smoothing": 0.0}


class Refused(Exception):
    """Why a place is left alone."""


@dataclass(frozen=True)
class Head:
    """The product that makes the logits: hidden (..., H), weight (V, H), bias (V). node: makes them."""

    node: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def linear_cross_entropy(forward: Forward) -> tuple[Site, ...]:
    """Rewrite every place that gains by it and can be; name those that cannot."""
    found = [_site(forward, loss) for loss in forward.calls(ATEN.cross_entropy_loss.default)]
    return tuple(site for site in found if site is not None)


def _site(forward: Forward, loss: fx.Node) -> Site | None:
    where = source_line(loss)
    try:
        head, between = _head(loss)
        if not _gains(loss, head):
            return None
        options = _options(loss)
        beside = _returned(forward, head, between[0] if between else loss)
    except Refused as why:
        return Site(where, refused=str(why))
    read: Tensor = loss.args[0].meta["val"]  # type: ignore[union-attr]
    _replace(forward, loss, head, between, options)
    _postpone(forward, head, beside)
    return Site(where, read.numel() * read.element_size())


def _gains(loss: fx.Node, head: Head) -> bool:
    """Whether the operation takes less than logits do: as log-softmax, and as its gradient and what that is made of.

    It takes a chunk of them and makes the hidden state's gradient early. A classifier of a few classes gains nothing.
    """
    read: Tensor = loss.args[0].meta["val"]  # type: ignore[union-attr]
    words, width = head.weight.meta["val"].shape
    rows, itemsize = read.numel() // words, head.node.meta["val"].element_size()
    takes = kernel.workspace_bytes(rows, words, width, itemsize) + rows * width * itemsize
    return bool(takes < LOGITS * read.numel() * loss.meta["val"].element_size())  # of autocast: fp32


def _options(loss: fx.Node) -> tuple[int, float, int]:
    """(ignore_index, label smoothing, reduction) of the loss. Refused where the operation has no such loss."""
    names = ("self", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    given: dict[str, Any] = {**DEFAULTS, **dict(zip(names, loss.args, strict=False)), **loss.kwargs}
    if given["weight"] is not None:
        raise Refused("classes have weights")
    if given["reduction"] not in (kernel.MEAN, kernel.SUM):
        raise Refused("the loss is not reduced to one number")
    if given["target"].meta["val"].is_floating_point() or given["self"].meta["val"].dim() != 2:
        raise Refused("targets are probabilities, or logits are no matrix")
    return given["ignore_index"], given["label_smoothing"], given["reduction"]


def _head(loss: fx.Node) -> tuple[Head, list[fx.Node]]:
    """The product behind the loss, and the nodes between them, in order."""
    between: list[fx.Node] = []
    node = loss.args[0]
    while isinstance(node, fx.Node):
        if (head := _product(node)) is not None:
            return head, between
        if not _passes(node):
            raise Refused(f"{node.target} stands between the product and the loss")
        if any(user is not loss and user not in between for user in node.users):
            raise Refused("logits are read by more than the loss")
        between.insert(0, node)
        node = node.args[0]
    raise Refused("what the loss reads is no product with a weight")


def _passes(node: fx.Node) -> bool:
    """Whether the node leaves words where they are: a cast, a copy, a reshape or slice of rows."""
    if node.target in CASTS or node.target in SAME:
        return True
    read, made = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if node.target in SHAPES:
        return bool(made.shape[-1] == read.shape[-1])
    return node.target is ATEN.slice.Tensor and _dim(node) % read.dim() != read.dim() - 1


def _dim(node: fx.Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(dim, int)
    return dim


def _product(node: fx.Node) -> Head | None:
    """The node as a product of rows with a (V, H) weight, if it is one."""
    args: tuple[Any, ...] = node.args
    if node.target is ATEN.linear.default:
        return Head(node, args[0], args[1], args[2] if len(args) > 2 else None)
    if node.target in (ATEN.mm.default, ATEN.matmul.default) and (turned := _turned(args[1])) is not None:
        return Head(node, args[0], turned, None)
    if node.target is ATEN.addmm.default and not node.kwargs and (turned := _turned(args[2])) is not None:
        return Head(node, args[1], turned, args[0]) if args[0].meta["val"].dim() == 1 else None
    return None


def _turned(node: fx.Node) -> fx.Node | None:
    """What this is the transpose of, if it is a matrix's."""
    if node.target in TURNS and node.meta["val"].dim() == 2:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source if source.meta["val"].shape != node.meta["val"].shape or node.target is ATEN.t.default else None
    return None


def _returned(forward: Forward, head: Head, first: fx.Node) -> list[int]:
    """Outputs that are the logits, detached. Refused where somebody else reads them."""
    returned: list[Any] = list(forward.graph.output_node().args[0])  # type: ignore[arg-type]
    others = [user for user in head.node.users if user is not first]
    for user in others:
        if user.target is not ATEN.detach.default or any(reader.op != "output" for reader in user.users):
            raise Refused("logits are read by more than the loss")
    beside = [at for at, node in enumerate(returned) if node in others]
    if beside and not all(_given(node) for node in (head.weight, head.bias)):
        raise Refused("logits are returned, and the weight is no parameter")
    return beside


def _given(node: fx.Node | None) -> bool:
    return node is None or node.op == "placeholder"


def _replace(
    forward: Forward, loss: fx.Node, head: Head, between: list[fx.Node], options: tuple[int, float, int]
) -> None:
    """The loss by the one operation, on the rows that reach it."""
    dtype = head.node.meta["val"].dtype  # autocast computes in another type than the parameters'
    graph = forward.graph
    with graph.inserting_before(loss):
        rows = _cast(forward, _rows(forward, head, between), dtype)
        weight, bias = _cast(forward, head.weight, dtype), head.bias and _cast(forward, head.bias, dtype)
        wanted = [trained(head.hidden), trained(head.weight), head.bias is not None and trained(head.bias)]
        args = (
            rows,
            weight,
            bias,
            loss.args[1],
            *options,
            loss.meta["val"].dtype,
            wanted,
            kernel.chunk_bytes(forward.chunks),
        )
        both = forward.new(torch.ops.memopt.linear_cross_entropy.default, args, loss)
        new = graph.call_function(operator.getitem, (both, 0))
        new.meta = {**loss.meta, "val": both.meta["val"][0]}
    loss.replace_all_uses_with(new)
    for node in (loss, *reversed(between)):
        graph.erase_node(node)


def _cast(forward: Forward, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else forward.new(ATEN.to.dtype, (node, dtype), node)


def _rows(forward: Forward, head: Head, between: list[fx.Node]) -> fx.Node:
    """The hidden state with the reshapes and slices done that the logits went through: (N, H)."""
    rows, width = head.hidden, head.hidden.meta["val"].shape[-1]
    for node in between:
        if node.target in SHAPES:
            rows = forward.new(ATEN.reshape.default, (rows, [*node.meta["val"].shape[:-1], width]), rows)
        elif node.target is ATEN.slice.Tensor:
            rows = forward.new(ATEN.slice.Tensor, (rows, *node.args[1:]), rows)
    return rows


def _postpone(forward: Forward, head: Head, beside: list[int]) -> None:
    """Have the graph return the hidden state for logits that somebody may read later, and forget the logits."""
    output, inputs = forward.graph.output_node(), forward.graph.find_nodes(op="placeholder")
    returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    for at in beside:
        logits, value = returned[at], head.node.meta["val"]
        with forward.graph.inserting_before(logits):
            returned[at] = forward.new(ATEN.detach.default, (head.hidden,), logits)
        bias = None if head.bias is None else inputs.index(head.bias)
        forward.later[at] = Later(inputs.index(head.weight), bias, tuple(value.shape), value.dtype)
    old = list(head.node.users)
    output.args = (tuple(returned),)
    for node in (*old, head.node):
        forward.graph.erase_node(node)


@dataclass(frozen=True)
class LinearCrossEntropy(Rewrite):
    """Never hold logits. Assumes: a gradient reaches the loss alone, which AOTAutograd's differentiation keeps."""

    name, numerics, begins_at = "linear_cross_entropy", Numerics.REORDERED, ("cross_entropy",)
    run = staticmethod(linear_cross_entropy)
