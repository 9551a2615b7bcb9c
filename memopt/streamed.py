"""A region of the forward that runs a few rows at a time, in forward and backward: memopt::streamed.

    streamed(rows, whole, seed, region, chunks) -> outputs
    streamed_backward(gradients, rows, whole, seed, region, chunks) -> gradients of rows and whole that are wanted

Nothing of the inside outlives a chunk: saved are the inputs alone, and the backward runs each chunk's forward again
before it differentiates it, as StreamBP (arXiv:2506.03077) and tiled MLPs (arXiv:2506.13996) do. Gradients of what all
chunks read are summed up over the chunks, in fp32 at least. Random numbers are drawn from a seed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import register_flop_formula

import memopt.operations  # noqa: F401  # registers those named below
from memopt.algebra.axes import ATEN, EXPANDS, REGROUPS, shape_of
from memopt.algebra.rows import Found, Place, Rows, Summed
from memopt.facts import WORKSPACES
from memopt.kernels.codec import LIBRARY
from memopt.kernels.logits import chunk_bytes
from memopt.program import Program, copied, photograph
from memopt.runtime.executor import Executor
from memopt.timeline import timeline

TURNS = frozenset({ATEN.t.default})
REGIONS: dict[str, Region] = {}  # of this process, by key; every capture finds the same ones again


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


# the operation


def forward(
    rows: Sequence[Tensor], whole: Sequence[Tensor], seed: Tensor | None, key: str, chunks: int
) -> list[Tensor]:
    """The region's outputs, a chunk at a time."""
    region = REGIONS[key]
    made = _fresh(region)
    for first, end in region.chunks(chunks):
        parts = [part(x, place, region.count, first, end) for x, place in zip(rows, region.row_places, strict=True)]
        with drawing(seed, first):
            found = list(chunk(region, end - first, None).run([*parts, *whole]))
        for into, place in zip(made, region.output_places, strict=True):
            if isinstance(place, Place):
                put(into, place, region.count, first, found.pop(0))
            else:
                into.add_(found.pop(0), alpha=(end - first) / region.count if place.mean else 1)
    return [total.to(like.dtype) for total, like in zip(made, region.outputs, strict=True)]


def backward(
    gradients: Sequence[Tensor | None], rows: Sequence[Tensor], whole: Sequence[Tensor], seed: Tensor | None, key: str,
    chunks: int,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are wanted, a chunk at a time."""
    region, given = REGIONS[key], tuple(gradient is not None for gradient in gradients)
    by_row, summed = region.wanted[: len(rows)], region.wanted[len(rows) :]
    made = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x, yes in zip(rows, by_row, strict=True) if yes
    ]
    sums = [
        torch.zeros(x.shape, dtype=sum_type(x), device=x.device) for x, yes in zip(whole, summed, strict=True) if yes
    ]
    places = [place for place, yes in zip(region.row_places, by_row, strict=True) if yes]
    known = [(g, place) for g, place in zip(gradients, region.output_places, strict=True) if g is not None]
    for first, end in region.chunks(chunks):
        parts = [part(x, place, region.count, first, end) for x, place in zip(rows, region.row_places, strict=True)]
        slopes = [above(g, place, region.count, first, end) for g, place in known]
        with drawing(seed, first):
            found = list(chunk(region, end - first, given).run([*parts, *whole, *slopes, *sums]))
        del parts, slopes
        for into, place in zip(made, places, strict=True):
            if (value := found.pop(0)) is not None:
                put(into, place, region.count, first, value)
            del value
    kept = [x for x, yes in zip(whole, summed, strict=True) if yes]
    for x in kept:
        made.append(sums.pop(0).to(x.dtype))
    return made


@contextmanager
def drawing(seed: Tensor | None, first: int) -> Iterator[None]:
    """Have the chunk that begins at row `first` draw the same in forward and backward."""
    if seed is None:
        yield
        return
    at = seed.device.index or 0
    generator = torch.cuda.default_generators[at] if seed.is_cuda else torch.default_generator
    with torch.random.fork_rng([seed.device] if seed.is_cuda else []):
        generator.manual_seed(int(seed) + first)  # of this device alone: torch.manual_seed would seed others too
        yield


def _fresh(region: Region) -> list[Tensor]:
    """Room for the outputs; sums begin at nothing, and are made in fp32 at least."""
    made = []
    for x, place in zip(region.outputs, region.output_places, strict=True):
        room = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        made.append(room if isinstance(place, Place) else torch.zeros_like(room, dtype=sum_type(room)))
    return made


LIBRARY.define("streamed(Tensor[] rows, Tensor[] whole, Tensor? seed, str region, int chunks) -> Tensor[]")
LIBRARY.define(
    "streamed_backward(Tensor?[] gradients, Tensor[] rows, Tensor[] whole, Tensor? seed, str region, int chunks) -> "
    "Tensor[]"
)
LIBRARY.impl("streamed", forward, "CompositeExplicitAutograd")
LIBRARY.impl("streamed_backward", backward, "CompositeExplicitAutograd")


def _forward_fake(rows: Sequence[Tensor], whole: Any, seed: Any, key: str, chunks: int) -> list[Tensor]:
    return [rows[0].new_empty(x.shape, dtype=x.dtype) for x in REGIONS[key].outputs]


def _backward_fake(
    gradients: Any, rows: Sequence[Tensor], whole: Sequence[Tensor], seed: Any, key: str, chunks: int
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, yes in zip((*rows, *whole), REGIONS[key].wanted, strict=True) if yes]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, whole, seed, ctx.key, ctx.chunks = inputs
    ctx.counts = len(rows), len(whole)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*rows, *whole, seed)


def _differentiate(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    *given, seed = ctx.saved_tensors
    rows, whole = given[: ctx.counts[0]], given[ctx.counts[0] :]
    found = iter(torch.ops.memopt.streamed_backward(gradients, rows, whole, seed, ctx.key, ctx.chunks))
    wanted = REGIONS[ctx.key].wanted
    by_input = [next(found) if yes else None for yes in wanted]
    return by_input[: len(rows)], by_input[len(rows) :], None, None, None


torch.library.register_fake("memopt::streamed", _forward_fake, lib=LIBRARY)
torch.library.register_fake("memopt::streamed_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("memopt::streamed", _differentiate, setup_context=_save, lib=LIBRARY)

STREAMED = torch.ops.memopt.streamed.default
STREAMED_BACKWARD = torch.ops.memopt.streamed_backward.default
# Operations whose last argument follows from the number of chunks, and how.
IN_CHUNKS: dict[Any, Callable[[int], int]] = {
    STREAMED: int,
    STREAMED_BACKWARD: int,
    torch.ops.memopt.linear_cross_entropy.default: chunk_bytes,
    torch.ops.memopt.linear_statistics.default: chunk_bytes,
    torch.ops.memopt.linear_statistics_backward.default: chunk_bytes,
}


# what planning knows of it


def _chunked(node: fx.Node) -> list[tuple[int, Chunk]]:
    """(how many, chunk) of the node's sizes of chunks."""
    *_, key, chunks = node.args
    region = REGIONS[str(key)]
    given = None
    if node.target is STREAMED_BACKWARD:
        given = tuple(each is not None for each in node.args[0])  # type: ignore[union-attr]
    sizes = [end - first for first, end in region.chunks(int(chunks))]  # type: ignore[arg-type]
    return [(sizes.count(size), chunk(region, size, given)) for size in dict.fromkeys(sizes)]


def _workspace(node: fx.Node) -> int:
    """The largest chunk's; below fp32 the sums as well, and one of them in both types."""
    inside = max(each.workspace for _, each in _chunked(node))
    region = REGIONS[str(node.args[-2])]
    if node.target is STREAMED:
        return inside
    low = [
        prod(x.shape)
        for x, yes in zip(region.whole, region.wanted[len(region.rows) :], strict=True)
        if yes and x.dtype.itemsize < 4
    ]
    return inside + 4 * sum(low) - _late(region)


def _late(region: Region) -> int:
    """Bytes of gradients of less than fp32 that are made when the chunks are gone."""
    pairs = zip(region.whole, region.wanted[len(region.rows) :], strict=True)
    return sum(x.dtype.itemsize * prod(x.shape) for x, yes in pairs if yes and x.dtype.itemsize < 4)


WORKSPACES[STREAMED] = WORKSPACES[STREAMED_BACKWARD] = _workspace


@register_flop_formula(torch.ops.memopt.streamed, get_raw=True)
def _flops(rows: Any, whole: Any, seed: Any, key: str, chunks: int, **_: Any) -> int:
    region = REGIONS[key]
    return sum(chunk(region, end - first, None).flops for first, end in region.chunks(chunks))


@register_flop_formula(torch.ops.memopt.streamed_backward, get_raw=True)
def _backward_flops(gradients: Any, rows: Any, whole: Any, seed: Any, key: str, chunks: int, **_: Any) -> int:
    region, given = REGIONS[key], tuple(gradient is not None for gradient in gradients)
    return sum(chunk(region, end - first, given).flops for first, end in region.chunks(chunks))
