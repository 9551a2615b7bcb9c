"""A region of the forward whose rows are independent, and the graphs of one chunk of its rows.

`Region` is what a pass found (memopt/passes/stream.py); `chunk` traces it for so many rows, once: the forward alone, or
forward and backward with the gradients of what all chunks read added to sums.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from memopt.algebra.axes import ATEN, EXPANDS, REGROUPS, shape_of
from memopt.algebra.rows import Found, Place, Rows, Summed
from memopt.photograph import photograph
from memopt.program import Program, copied
from memopt.runtime.executor import Executor
from memopt.timeline import timeline

TURNS = frozenset({ATEN.t.default})


@dataclass(frozen=True)
class Like:
    """A tensor's shape, strides and type."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(value: Tensor) -> Like:
        return Like(tuple(map(int, value.shape)), tuple(map(int, value.stride())), value.dtype, value.device)

    def fake(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Region:
    """graph: placeholders for what is read by rows, then for what is read whole; returns its outputs.

    places: where the rows of its nodes are, or that they are summed up. wanted: which of the inputs get a gradient.
    autocast: (device type, dtype) if it was captured under autocast.
    """

    graph: fx.Graph
    count: int
    places: Found
    rows: tuple[Like, ...]
    whole: tuple[Like, ...]
    outputs: tuple[Like, ...]
    wanted: tuple[bool, ...]
    random: bool = False
    autocast: tuple[str, torch.dtype] | None = None
    made: dict[Any, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def key(self) -> str:
        lines = [node.format_node() or "" for node in self.graph.nodes]
        lines += [str(each) for each in (self.count, list(self.places.values()), self.rows, self.whole, self.outputs)]
        lines += [str(self.wanted), str(self.autocast)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @cached_property
    def row_places(self) -> tuple[Place, ...]:
        places = (self.places[holder] for holder in self.holders[: len(self.rows)])
        return tuple(place for place in places if isinstance(place, Place))

    @cached_property
    def output_places(self) -> tuple[Place | Summed, ...]:
        returned: Any = self.graph.output_node().args[0]
        return tuple(self.places[node] for node in returned)

    @cached_property
    def holders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    def chunks(self, count: int) -> Iterator[tuple[int, int]]:
        """(first row, end) of each of so many chunks, or fewer where there are not so many rows."""
        size = -(-self.count // count)
        return ((at, min(at + size, self.count)) for at in range(0, self.count, size))

    def of(self, count: int) -> fx.GraphModule:
        """The graph for `count` rows."""
        graph, sizes = copied(self.graph), Rows(self.count)
        for node, old in zip(list(graph.nodes), list(self.graph.nodes), strict=True):
            if node.target in REGROUPS | EXPANDS:
                place = self.places[old]
                assert isinstance(place, Place)
                shape = list(sizes.resized(shape_of(old), place, count))
                node.target = ATEN.expand.default if node.target in EXPANDS else ATEN.reshape.default
                node.args, node.kwargs = (node.args[0], shape), {}
        return fx.GraphModule({}, graph)


def part(x: Tensor, place: Place, count: int, first: int, end: int) -> Tensor:
    """Some rows of a tensor that has `count` of them, contiguous: a view where they lie together."""
    outer = x.shape[place.dim] // (count * place.inner)
    if outer == place.inner == 1:
        return x.narrow(place.dim, first, end - first).contiguous()
    apart: Tensor = x.unflatten(place.dim, (outer, count, place.inner))
    return apart.narrow(place.dim + 1, first, end - first).flatten(place.dim, place.dim + 2).contiguous()


def above(gradient: Tensor, place: Place | Summed, count: int, first: int, end: int) -> Tensor:
    """What a chunk of rows gets of an output's gradient: its rows; of a sum all of it, of a mean its share."""
    if isinstance(place, Place):
        return part(gradient, place, count, first, end)
    return gradient * ((end - first) / count) if place.mean else gradient


def put(into: Tensor, place: Place, count: int, first: int, value: Tensor) -> None:
    """Write rows into a tensor."""
    outer = into.shape[place.dim] // (count * place.inner)
    rows = value.shape[place.dim] // (outer * place.inner)
    apart = into.unflatten(place.dim, (outer, count, place.inner)).narrow(place.dim + 1, first, rows)
    apart.copy_(value.unflatten(place.dim, (outer, rows, place.inner)))


# graphs of one chunk


@dataclass(frozen=True)
class Chunk:
    """A traced chunk. module: what runs; workspace: bytes it holds beside its inputs at most; flops: of one run."""

    module: fx.GraphModule
    run: Executor
    workspace: int
    flops: int


def chunk(region: Region, count: int, given: tuple[bool, ...] | None) -> Chunk:
    """Of `count` rows: the forward, or, where `given` says which outputs have a gradient, forward and backward."""
    if (count, given) not in region.made:
        region.made[count, given] = _alone(lambda: _traced(region, count, given))
    found: Chunk = region.made[count, given]
    return found


def _alone(run: Callable[[], Chunk]) -> Chunk:
    """In a thread of its own: whatever modes and dispatch keys are set here are not set there."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(run())
        except BaseException as error:  # raised again where it belongs
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    made: Chunk = found[0]
    return made


def _traced(region: Region, count: int, given: tuple[bool, ...] | None) -> Chunk:
    cast = nullcontext() if region.autocast is None else torch.autocast(region.autocast[0], region.autocast[1])
    with FakeTensorMode() as mode, cast:
        pairs = list(zip(region.rows, region.row_places, strict=True))
        rows = [part(x.fake(), place, region.count, 0, count) for x, place in pairs]
        whole = [x.fake() for x in region.whole]
        graph = region.of(count)
        if given is None:
            module = make_fx(lambda *args: fx.Interpreter(graph).run(*args))(*rows, *whole)
        else:
            module = _joint(region, graph, rows, whole, given, count)
    with mode:
        module.graph.eliminate_dead_code()
        module.recompile()
    if given is not None:
        outputs = zip(region.outputs, region.output_places, given, strict=True)
        pairs += [(x, place) for x, place, has in outputs if has and isinstance(place, Place)]
    held, flops = _figures(module)
    return Chunk(module, Executor(module), held + sum(_copied(region, *pair, count) for pair in pairs), flops)


def _copied(region: Region, x: Like, place: Place, count: int) -> int:
    """Bytes of what a chunk reads by rows, where it has to be copied."""
    with FakeTensorMode():
        whole = x.fake()
        rows = part(whole, place, region.count, 0, count)
        same = rows.untyped_storage()._cdata == whole.untyped_storage()._cdata
        return 0 if same else rows.numel() * rows.element_size()


def _joint(
    region: Region, graph: fx.GraphModule, rows: list[Tensor], whole: list[Tensor], given: tuple[bool, ...], count: int
) -> fx.GraphModule:
    """(rows, whole, gradients, sums) -> gradients of rows; those of what is read whole are added to the sums."""
    pairs = zip(region.outputs, region.output_places, given, strict=True)
    gradients = [above(x.fake(), place, region.count, 0, count) for x, place, has in pairs if has]
    sums = [
        x.new_empty(x.shape, dtype=sum_type(x)) for x, yes in zip(whole, region.wanted[len(rows) :], strict=True) if yes
    ]
    inputs = len(rows) + len(whole)

    def run(*args: Tensor) -> Any:
        leaves = [x.detach().requires_grad_(yes) for x, yes in zip(args[:inputs], region.wanted, strict=True)]
        with torch.enable_grad():
            made = fx.Interpreter(graph).run(*leaves)
        ends = [out for out, has in zip(made, given, strict=True) if has]
        starts = [x for x, yes in zip(leaves, region.wanted, strict=True) if yes]
        trained = [(out, g) for out, g in zip(ends, args[inputs:], strict=False) if out.requires_grad]
        return torch.autograd.grad([o for o, _ in trained], starts, [g for _, g in trained], allow_unused=True)

    module = make_fx(run)(*rows, *whole, *gradients, *sums)
    _sum_up(module.graph, sum(region.wanted[: len(rows)]), len(sums))
    return module


def _sum_up(graph: fx.Graph, rows: int, sums: int) -> None:
    """Add gradients of what is read whole to the sums as soon as they are made, and return those of rows alone."""
    output = graph.output_node()
    made: Any = list(output.args[0])  # type: ignore[arg-type]
    holders = graph.find_nodes(op="placeholder")
    output.args = (tuple(made[:rows]),)
    for total, gradient in zip(holders[len(holders) - sums :], made[rows:], strict=True):
        if gradient is not None:
            _add(graph, total, gradient)


def _add(graph: fx.Graph, total: fx.Node, gradient: fx.Node) -> None:
    """Right behind the node that makes the gradient, whichever way it is then turned."""
    source, turned = gradient, False
    while source.target in TURNS:
        source, turned = source.args[0], not turned  # type: ignore[assignment]
    with graph.inserting_before(source.next):
        into = total
        if turned:
            into = graph.call_function(ATEN.t.default, (total,))
            into.meta["val"] = total.meta["val"].t()
        same = source.meta["val"].dtype == total.meta["val"].dtype
        if source.target is ATEN.mm.default and same:  # the product goes right into the sum
            added = graph.call_function(ATEN.addmm_.default, (into, *source.args))
        else:
            added = graph.call_function(ATEN.add_.Tensor, (into, source))
        added.meta["val"] = into.meta["val"]


def _figures(module: fx.GraphModule) -> tuple[int, int]:
    """(bytes held beside the inputs at most, flops)."""
    count = len(module.graph.output_node().args[0])  # type: ignore[arg-type]
    graph = photograph(Program(module, count, {}, {}))
    held = sum(graph.storages[name].nbytes for name in graph.input_storages)
    return max(timeline(graph), default=held) - held, sum(step.flops for step in graph.steps)


def sum_type(x: Tensor) -> torch.dtype:
    """In which sums over chunks are made."""
    return x.dtype if x.dtype.itemsize >= 4 else torch.float32
