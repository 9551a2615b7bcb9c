"""Norms, MLPs and heads run a few rows at a time, in forward, recomputation and backward; attention, with its norm and
projections, a few sequences of the batch.

What lies between two narrow places of the rows' way (memopt/algebra/regions.py), or between one and a sum over the rows
(a loss that compares two models' logits, say), becomes one operation that holds a chunk of its inside at a time
(memopt/streamed.py). It costs the inside's forward once more, as recomputing it does.
How many chunks is the planner's choice (`Forward.chunks`); it proposes none where the step does as well without.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from memopt.algebra.axes import ATEN
from memopt.algebra.regions import Seeds, Stretch, attends, draws, settle, stretches, wide
from memopt.facts import source_line
from memopt.forward import Forward, gives_gradient, trained
from memopt.passbase import Numerics, Rewrite, Site
from memopt.regions import Like, Region
from memopt.streamed import REGIONS, STREAMED

SEEDS = 1 << 62


def run(forward: Forward) -> tuple[Site, ...]:
    """Every stretch around a wide product that pays."""
    return _streamed(forward, wide)


def attention(forward: Forward) -> tuple[Site, ...]:
    """Every stretch around attention that pays."""
    return _streamed(forward, attends)


def _streamed(forward: Forward, seeds: Seeds) -> tuple[Site, ...]:
    if cast := [node for node in forward.graph.nodes if "_enter_autocast" in str(node.target)]:
        return (Site(source_line(cast[0]), refused="the forward switches autocast on or off within itself"),)
    settle(forward.graph)
    return tuple(_site(forward, found) for found in list(stretches(forward.graph, seeds)))


def _site(forward: Forward, found: Stretch) -> Site:
    single = (node for node in found.nodes if isinstance(node.meta["val"], Tensor))
    largest = max(single, key=lambda node: node.meta["val"].numel())
    site, region = Site(source_line(largest), found.inside_bytes), _region(found)
    _replace(forward, found, REGIONS.setdefault(region.key, region))
    return site


def _region(found: Stretch) -> Region:
    """The stretch as a graph of its own. Nodes are named by their places: layers that are alike share a region."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for at, arg in enumerate((*found.by_rows, *found.whole)):
        made[arg] = graph.placeholder(f"given_{at}")
        made[arg].meta = {"val": arg.meta["val"]}
    for at, node in enumerate(found.nodes):
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].name = f"made_{at}"
    graph.output(tuple(made[node] for node in found.returned))
    places = {made[node]: place for node, place in found.places().items()}
    rows, whole, outputs = (
        tuple(Like.of(node.meta["val"]) for node in nodes) for nodes in (found.by_rows, found.whole, found.returned)
    )
    wanted = tuple(_wanted(node, found) for node in (*found.by_rows, *found.whole))
    random = any(map(draws, found.nodes))
    return Region(graph, found.rows.count, places, rows, whole, outputs, wanted, random, _autocast(found))


def _wanted(node: fx.Node, found: Stretch) -> bool:
    """Whether what is read gets a gradient from what is made of it."""
    reached = {node}
    for each in found.nodes:
        if gives_gradient(each) and any(arg in reached for arg in each.all_input_nodes):
            reached.add(each)
    leaves = any(each in reached for each in found.returned)
    return bool(leaves and node.meta["val"].is_floating_point() and trained(node))


def _autocast(found: Stretch) -> tuple[str, torch.dtype] | None:
    kind = found.returned[0].meta["val"].device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


def _replace(forward: Forward, found: Stretch, region: Region) -> None:
    graph, last = forward.graph, found.nodes[-1]
    inside, later = set(found.nodes), found.between
    with graph.inserting_before(last.next):
        seed = None
        if region.random:
            device = region.outputs[0].device
            seed = forward.new(ATEN.randint.default, (SEEDS, [1]), last, dtype=torch.int64, device=device)
        args = (list(found.by_rows), list(found.whole), seed, region.key, forward.chunks)
        end = call = forward.new(STREAMED, args, last)
        for at, node in enumerate(found.returned):
            end = graph.call_function(operator.getitem, (call, at))
            end.meta = {**node.meta, "val": call.meta["val"][at]}
            node.replace_all_uses_with(end, delete_user_cb=lambda user: user not in inside)
    for node in later:
        end.append(node)
        end = node
    for node in reversed(found.nodes):
        graph.erase_node(node)


@dataclass(frozen=True)
class Stream(Rewrite):
    """Never hold the inside of an MLP for all rows. Dropout is drawn anew: the same distribution, other numbers."""

    name, numerics, begins_at, costly = "stream", Numerics.REORDERED, ("linear", "addmm", "matmul", "einsum"), True
    run = staticmethod(run)


@dataclass(frozen=True)
class StreamAttention(Rewrite):
    """Never hold queries, keys, values and their gradients for all sequences of a batch: attention runs once more."""

    name, numerics, costly = "stream_attention", Numerics.REORDERED, True
    begins_at = ("scaled_dot_product_attention", "softmax")  # what another rewrite makes attention of
    run = staticmethod(attention)
