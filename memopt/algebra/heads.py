"""A linear layer over a large vocabulary, and what reads its outputs (logits): losses, and what losses are made of.

Found on the normalised forward: from a loss up to the product, through casts, reshapes, slices of rows, numbers and a
soft cap; then from the product down to everything else that reads it, so that nothing is left that needs the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from memopt.algebra.axes import ATEN, CASTS, COPIES
from memopt.forward import OFF, constant
from memopt.passbase import Refused

SHAPES = (ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default, ATEN.flatten.using_ints)
SLICES = (ATEN.slice.Tensor, ATEN.select.int)
TURNS = (ATEN.t.default, ATEN.transpose.int, ATEN.permute.default, ATEN.numpy_T.default)
TIMES, OVER = (ATEN.mul.Tensor, ATEN.mul.Scalar), (ATEN.div.Tensor, ATEN.div.Scalar)
LOSSES = (ATEN.cross_entropy_loss.default, ATEN.nll_loss_nd.default, ATEN.nll_loss.default)
NORMALISED = ATEN.log_softmax.int
MORE = "logits are read by more than the loss"


@dataclass(frozen=True)
class Head:
    """The product that makes the logits: hidden (..., H), weight (V, H), bias (V). node: makes them."""

    node: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None


@dataclass(frozen=True)
class Path:
    """From the product to what reads it. nodes: in order. Logits are scale x, or cap tanh(scale x) where cap is not 0,
    computed in bent_in; normalised: log-probabilities are read instead of them."""

    nodes: tuple[fx.Node, ...] = ()
    scale: float = 1.0
    cap: float = 0.0
    normalised: bool = False
    bent_in: torch.dtype | None = None

    def to(self, node: fx.Node) -> Path | None:
        """The path one node further; None if that is no longer one of logits."""
        longer = replace(self, nodes=(*self.nodes, node))
        if _keeps_words(node):
            return longer
        if self.normalised:
            return None
        if node.target is NORMALISED and _last(node, node.args[1]):
            return replace(longer, normalised=True)
        bent = replace(longer, bent_in=self.bent_in or node.meta["val"].dtype)
        if node.target is ATEN.tanh.default:
            return None if self.cap else replace(bent, cap=1.0)
        if (number := _number(node)) is not None:
            return replace(bent, cap=self.cap * number) if self.cap else replace(bent, scale=self.scale * number)
        return None

    @property
    def end(self) -> fx.Node | None:
        """What is at its end; None for the product itself."""
        return self.nodes[-1] if self.nodes else None

    @property
    def bent(self) -> bool:
        """Whether logits are not the products themselves."""
        return self.scale != 1.0 or self.cap != 0.0

    def rows(self) -> tuple[Any, ...]:
        """What distinguishes the rows at its end from the product's: equal for two paths to the same rows."""
        cut = [node for node in self.nodes if node.target in SLICES]
        return tuple((node.target, tuple(node.args[0].meta["val"].shape), node.args[1:]) for node in cut)  # type: ignore[union-attr]

    def reshapes(self) -> bool:
        """Whether what is at its end has another shape than the product."""
        return any(node.target in SHAPES or node.target in SLICES for node in self.nodes)


@dataclass(frozen=True)
class Reader:
    """node: makes of each row at the end of the path a loss, its sum of exponentials, or the logit of one word."""

    node: fx.Node
    path: Path


@dataclass(frozen=True)
class Found:
    """A head with all that reads it. returned: outputs of the graph that are its logits, detached, and how to them.
    nodes: everything from the product, itself too, to the last that reads it."""

    head: Head
    readers: tuple[Reader, ...]
    returned: tuple[tuple[fx.Node, Path], ...]
    nodes: frozenset[fx.Node]


def head_of(loss: fx.Node) -> Head:
    """The product behind what a loss reads. Raises Refused."""
    node: Any = loss.args[0]
    while isinstance(node, fx.Node):
        if (head := _product(node)) is not None:
            return head
        if not _between(node):
            raise Refused(f"{node.target} stands between the product and the loss")
        node = node.args[0]
    raise Refused("what the loss reads is no product with a weight")


def found_at(head: Head) -> Found:
    """Everything that reads the head's logits. Raises Refused if something needs them whole."""
    readers: list[Reader] = []
    returned: list[tuple[fx.Node, Path]] = []
    below = list(_below(head.node, Path()))
    for node, path in ((node, path) for node, path, inside in below if not inside):
        if node.target is ATEN.detach.default and _only_returned(node) and not path.reshapes() and not path.normalised:
            returned.append((node, path))
        elif node.all_input_nodes[:1] == [path.end or head.node] and _reads_words(node, path):
            readers.append(Reader(node, path))
        else:
            raise Refused(MORE)
    nodes = frozenset({head.node, *(node for node, *_ in below)})
    if len({OFF in node.meta for node in nodes}) > 1:
        raise Refused("gradients are switched off for some of what reads the logits, and not for all")
    if not all(constant(node) for node in (*nodes, head.hidden, head.weight, head.bias) if node is not None):
        raise Refused("it reads a tensor that is written into")
    return Found(head, tuple(readers), tuple(returned), nodes)


def _below(node: fx.Node, path: Path) -> Iterator[tuple[fx.Node, Path, bool]]:
    """(node, path to it, whether the path goes on through it) of all that is made of the logits here."""
    for user in node.users:
        longer = path.to(user) if user.op == "call_function" and user.args[:1] == (node,) else None
        yield user, path, longer is not None
        if longer is not None:
            yield from _below(user, longer)


def _only_returned(node: fx.Node) -> bool:
    return all(reader.op == "output" for reader in node.users)


def _reads_words(node: fx.Node, path: Path) -> bool:
    """Whether the node reads of each row only its sum of exponentials and the logit of one word."""
    args: Any = node.args
    if node.target is ATEN.logsumexp.default:
        return not path.normalised and len(args[1]) == 1 and _last(node, args[1][0])
    if node.target is ATEN.gather.default:
        read, index = (args[at].meta["val"].shape for at in (0, 2))
        return _last(node, args[1]) and tuple(index) == (*read[:-1], 1)
    return node.target in LOSSES and (node.target is LOSSES[0]) is not path.normalised


def _keeps_words(node: fx.Node) -> bool:
    """Whether the node leaves words where they are: a cast, a copy, a reshape or slice of rows."""
    if node.target in CASTS | COPIES:
        return bool(node.meta["val"].is_floating_point() and node.meta["val"].device == _read(node).device)
    if node.target in SHAPES:
        return bool(node.meta["val"].shape[-1] == _read(node).shape[-1])
    return node.target in SLICES and not _last(node, node.args[1] if len(node.args) > 1 else 0)


def _between(node: fx.Node) -> bool:
    """Whether a path may lead through the node."""
    bends = node.target is ATEN.tanh.default or node.target is NORMALISED or _number(node) is not None
    return bends or _keeps_words(node)


def _read(node: fx.Node) -> torch.Tensor:
    value: torch.Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    return value


def _last(node: fx.Node, dim: Any) -> bool:
    """Whether the dimension is the last of what the node reads."""
    return bool(dim % _read(node).dim() == _read(node).dim() - 1)


def _number(node: fx.Node) -> float | None:
    """The number that the node multiplies by, if it does."""
    if node.target not in (*TIMES, *OVER) or len(node.args) != 2 or node.kwargs:
        return None
    number = node.args[1]
    if not isinstance(number, int | float) or not number:
        return None
    return float(number) if node.target in TIMES else 1.0 / number


def _product(node: fx.Node) -> Head | None:
    """The node as a product of rows with a (V, H) weight, if it is one."""
    args: tuple[Any, ...] = node.args
    if node.target is ATEN.linear.default and args[1].meta["val"].dim() == 2:
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
