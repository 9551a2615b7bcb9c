"""Stretches of rowwise nodes that hold much inside and are entered and left by little: what pays to run in chunks.

From a wide product (a weight that makes rows twice as long, or longer) the rows are followed through the graph in both
directions. In the order of the graph, what the rowwise nodes hold for one another has a width at each place; a region
runs from the nearest narrowest place before the product to the nearest narrowest one behind it, as far as no path leads
out of it and back. In a transformer these places are the residual stream's, and the region is norm, MLP and sum.
From attention the sequences of the batch are followed in the same way: norm, projections, attention and sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from memopt.algebra.axes import ATEN, CASTS, PERMUTES, REGROUPS, shape_of
from memopt.algebra.contraction import contraction
from memopt.algebra.rows import WITHIN, Across, Found, Known, Place, Rows, Summed
from memopt.facts import is_getitem
from memopt.forward import OFF, constant, is_view, mark_switched_off, trained, written

WIDER = 2  # times as long as its input is a row that a wide product makes
REACH = 96  # nodes before and behind it that are looked at
GAIN = 2  # times what enters and leaves a region, of what is held inside
NARROW = 1.5  # times the narrowest place within reach: near enough to it
FEWEST = 64  # rows that are worth splitting
COUNTING = frozenset({ATEN.batch_norm.default, ATEN.instance_norm.default})  # write statistics, which no schema says


@dataclass(frozen=True)
class Stretch:
    """nodes: in order. known: where the rows of its nodes and of what it reads by rows are."""

    nodes: tuple[fx.Node, ...]
    rows: Rows
    known: Found

    @property
    def read(self) -> tuple[fx.Node, ...]:
        """What it reads from outside, in order."""
        inside = set(self.nodes)
        return tuple(dict.fromkeys(arg for node in self.nodes for arg in node.all_input_nodes if arg not in inside))

    @property
    def by_rows(self) -> tuple[fx.Node, ...]:
        return tuple(arg for arg in self.read if self._place(arg) is not None)

    @property
    def whole(self) -> tuple[fx.Node, ...]:
        return tuple(arg for arg in self.read if self._place(arg) is None)

    def _place(self, arg: fx.Node) -> Place | None:
        """Where the rows of what is read are; None if it is read whole."""
        inside = set(self.nodes)
        for user in arg.users:
            if user in inside and (found := self.rows.read(user, self.known[user]).get(arg)) is not None:
                return found
        return None

    def places(self) -> Found:
        """Of all nodes and of what is read by rows."""
        return {n: self.known[n] for n in self.nodes} | {arg: p for arg in self.read if (p := self._place(arg))}

    @property
    def consistent(self) -> bool:
        """Whether nothing is read both by rows and whole, or by rows that are elsewhere, or before it is summed up, and
        nothing that is read is written into."""
        inside = set(self.nodes)
        if not all(map(constant, self.read)):
            return False
        for node in self.nodes:
            read = self.rows.read(node, self.known[node])
            if any(arg in inside and read.get(arg) != self.known[arg] for arg in node.all_input_nodes):
                return False
        for arg in self.read:
            users = [user for user in arg.users if user in inside]
            if len({self.rows.read(user, self.known[user]).get(arg) for user in users}) > 1:
                return False
        return True

    @property
    def between(self) -> tuple[fx.Node, ...]:
        """What stands between the stretch's nodes and depends on them: it runs behind them."""
        inside, node = set(self.nodes), self.nodes[0]
        later: dict[fx.Node, None] = {}
        while node is not self.nodes[-1]:
            if node not in inside and any(arg in inside or arg in later for arg in node.all_input_nodes):
                later[node] = None
            node = node.next
        return tuple(later)

    @property
    def separable(self) -> bool:
        """Whether what stands between may as well run behind."""
        off = OFF in self.nodes[-1].meta
        return all(_pure(node) and (OFF in node.meta) is off for node in self.between)

    @property
    def returned(self) -> tuple[fx.Node, ...]:
        """Nodes that are read outside."""
        inside = set(self.nodes)
        return tuple(node for node in self.nodes if any(user not in inside for user in node.users))

    @property
    def inside_bytes(self) -> int:
        outside = set(self.returned)
        return sum(_fresh_bytes(node) for node in self.nodes if node not in outside)

    @property
    def border_bytes(self) -> int:
        """Of what enters and leaves. The graph's own inputs are there anyway; what gets no gradient would be saved too,
        to be compared with."""
        entering = [node for node in self.by_rows if trained(node) and node.op != "placeholder"]
        return sum(_bytes(node) for node in (*entering, *self.returned))


Seeds = Callable[[fx.Node], tuple[Place, int] | None]  # where the rows of such a node's result are, and how many


def stretches(graph: fx.Graph, seeds: Seeds) -> Iterator[Stretch]:
    """Those around such nodes that pay, in order, none of them in another."""
    taken: set[fx.Node] = set()
    grown: dict[fx.Node, tuple[Rows, Found, list[fx.Node]]] = {}
    for seed in list(graph.nodes):
        if seed in taken or (start := seeds(seed)) is None:
            continue
        if seed not in grown:
            rows = Rows(start[1])
            known, inside = _grown(rows, seed, start[0])
            members = [node for node in graph.nodes if node in inside]
            grown |= dict.fromkeys(members, (rows, known, members))
        if seed not in grown:
            continue
        found = _around(seed, *grown[seed], taken)
        if found is not None:
            taken |= set(found.nodes)
            yield found


def settle(graph: fx.Graph) -> None:
    """Move wide products, and what is made of them in their size, down to what reads them first: the head of a model
    whose logits are compared with another's stands before that other model."""
    late: set[fx.Node] = set()
    for node in filter(_movable, graph.nodes):
        made_of = [arg for arg in node.all_input_nodes if arg in late and _bytes(arg) <= _bytes(node)]
        if made_of or wide(node) is not None:
            late.add(node)
    for node in reversed(list(graph.nodes)):
        if node in late and node.users:
            first = node.next
            while first not in node.users:
                first = first.next
            if (OFF in node.meta) is (OFF in first.meta) or not trained(node, switched_on=True):
                first.prepend(node)
    mark_switched_off(graph)


def _movable(node: fx.Node) -> bool:
    """Whether it is a product, pointwise or a softmax, for which it does not matter when it runs, but for gradients
    switched on or off."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or not _pure(node):
        return False
    product = target in (ATEN.linear.default, ATEN.addmm.default) or contraction(node) is not None
    return product or target in CASTS | REGROUPS | WITHIN or torch.Tag.pointwise in target.tags


def _pure(node: fx.Node) -> bool:
    """Whether the node computes from what has one value, and does nothing else: no writing, drawing, counting."""
    target: Any = node.target
    if is_getitem(node):
        return True
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    free = not draws(node) and target not in COUNTING and not target._schema.is_mutable
    return free and all(map(constant, (node, *node.all_input_nodes)))


def draws(node: fx.Node) -> bool:
    """Whether the node uses random numbers."""
    if node.target is ATEN.dropout.default:
        return bool(node.args[2] and node.args[1])
    if node.target is ATEN.scaled_dot_product_attention.default:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p"))
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def wide(node: fx.Node) -> tuple[Place, int] | None:
    """Where the rows of a wide product's result are, and how many; None if it is none."""
    args: Any = node.args
    if node.op != "call_function":
        return None
    if node.target is ATEN.linear.default:
        x, weight = args[0], args[1]
    elif node.target is ATEN.addmm.default:
        x, weight = args[1], args[2]
    elif (product := contraction(node)) is not None:
        x, weight = product.operands
    else:
        return None
    shape, made = shape_of(x), shape_of(node)
    if len(shape_of(weight)) != 2 or made[:-1] != shape[:-1] or made[-1] < WIDER * shape[-1]:
        return None
    return _split(x, shape)


def attends(node: fx.Node) -> tuple[Place, int] | None:
    """The batch of attention that has more than one sequence."""
    if node.target is not ATEN.scaled_dot_product_attention.default:
        return None
    batch, *rest = shape_of(node)
    return (Place(0), batch) if len(rest) == 3 and batch > 1 else None


def _split(x: fx.Node, shape: tuple[int, ...]) -> tuple[Place, int] | None:
    """The longest dimension of rows, as it was before it was merged with others."""
    source = x
    while source.target in REGROUPS and shape_of(source.args[0])[-1] == shape[-1]:  # type: ignore[arg-type]
        source = source.args[0]  # type: ignore[assignment]
    whole = shape_of(source)
    dim = max(range(len(whole) - 1), key=lambda at: (whole[at], at), default=None)
    if dim is None or whole[dim] < FEWEST:
        return None
    return Rows(whole[dim]).regrouped(Place(dim), whole, shape), whole[dim]


def _grown(rows: Rows, seed: fx.Node, place: Place) -> tuple[Found, set[fx.Node]]:
    """Where rows are, of all nodes that are connected to the seed by rows; those of them that are rowwise."""
    known: Found = {seed: place}
    inside: set[fx.Node] = set()
    waiting = [seed]
    while waiting:
        node = waiting.pop()
        read = _read(rows, node, known[node])
        if read is not None and all(known.get(arg, at) == at for arg, at in read.items()):
            inside.add(node)
            waiting += [arg for arg in read if arg not in known]
            known |= read
        for user in node.users:
            if user not in known and (found := _made(rows, user, known)) is not None:
                known[user] = found
                waiting.append(user)
    return known, {node for node in inside if not is_getitem(node) or node.args[0] in inside}


def _read(rows: Rows, node: fx.Node, place: Place | Summed) -> Known | None:
    if (
        node.op != "call_function"
        or written(node)
        or getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    ):
        return None
    try:
        return rows.read(node, place) or None  # what reads no rows is the same for all chunks
    except Across:
        return None


def _made(rows: Rows, node: fx.Node, known: Found) -> Place | Summed | None:
    if node.op != "call_function":
        return None
    try:
        return rows.made(node, known)
    except Across:
        return None


def _around(seed: fx.Node, rows: Rows, known: Found, members: list[fx.Node], taken: set[fx.Node]) -> Stretch | None:
    """The stretch around a product; None if it does not pay."""
    here, width = members.index(seed), _widths(members)
    before, behind = [here], [here]

    def stops(at: int, nodes: Sequence[fx.Node]) -> bool:
        switched = (OFF in members[at].meta) is not (OFF in seed.meta)
        return members[at] in taken or switched or _looks_up(members[at]) or not _convex(nodes)

    for at in range(here - 1, max(-1, here - REACH), -1):
        if stops(at, members[at : here + 1]):
            break
        before.append(at)
    first = _narrow(before, [width[at] for at in before], 1.0)
    for at in range(here + 1, min(len(members), here + REACH)):
        if stops(at, members[first : at + 1]):
            break
        behind.append(at)
    last = _narrow(behind, [width[at + 1] for at in behind], NARROW)  # what all layers read ends with the last of them
    found = Stretch(tuple(members[first : last + 1]), rows, known)
    single = all(isinstance(node.meta["val"], Tensor) for node in (*found.returned, *found.read))
    if not single or not found.returned or not found.consistent or not found.separable:
        return None
    if found.inside_bytes < GAIN * found.border_bytes:
        return None
    return found


def _looks_up(node: fx.Node) -> bool:
    """Whether each chunk would make a gradient of a whole table."""
    return node.target is ATEN.embedding.default and trained(node.args[0])  # type: ignore[arg-type]


def _narrow(places: Sequence[int], widths: Sequence[int], enough: float) -> int:
    """The first of the places that is as narrow as any, or so many times as wide."""
    return next(at for at, width in zip(places, widths, strict=True) if width <= enough * min(widths))


def _widths(members: Sequence[fx.Node]) -> list[int]:
    """Bytes that rowwise nodes hold for later ones, before each of them and behind the last."""
    order = {node: at for at, node in enumerate(members)}
    change = [0] * (len(members) + 2)
    last: dict[fx.Node, int] = {}
    for node in reversed(members):
        ends = [order[user] for user in node.users if user in order]
        ends += [last[user] for user in node.users if user in last and _shares(user)]
        last[node] = max(ends, default=order[node])
    for node in members:
        if not _shares(node) or not any(arg in order for arg in node.all_input_nodes):
            change[order[node] + 1] += _bytes(node)
            change[last[node] + 1] -= _bytes(node)
    widths, held = [], 0
    for at in range(len(members) + 1):
        held += change[at]
        widths.append(held)
    return widths


def _shares(node: fx.Node) -> bool:
    """Whether the node is a view of what it reads."""
    return is_getitem(node) or node.target in REGROUPS | PERMUTES or is_view(node)


def _convex(nodes: Sequence[fx.Node]) -> bool:
    """Whether no path leads out of the nodes and back."""
    inside, reached = set(nodes), set[fx.Node]()
    node = nodes[0]
    while True:
        if any(arg in reached for arg in node.all_input_nodes):
            if node in inside:
                return False
            reached.add(node)
        elif node not in inside and any(arg in inside for arg in node.all_input_nodes):
            reached.add(node)
        if node is nodes[-1]:
            return True
        node = node.next


def _bytes(node: fx.Node) -> int:
    values: Iterable[Any] = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


def _fresh_bytes(node: fx.Node) -> int:
    return 0 if _shares(node) else _bytes(node)
