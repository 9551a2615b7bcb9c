"""A region of the forward that runs a few rows at a time, in forward and backward: memopt::streamed.

    streamed(rows, whole, seed, region, chunks) -> outputs
    streamed_backward(gradients, rows, whole, seed, region, chunks) -> gradients of rows and whole that are wanted

Nothing of the inside outlives a chunk: saved are the inputs alone, and the backward runs each chunk's forward again
before it differentiates it, as StreamBP (arXiv:2506.03077) and tiled MLPs (arXiv:2506.13996) do. Gradients of what all
chunks read are summed up over the chunks, in fp32 at least. Random numbers are drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

import memopt.operations  # noqa: F401  # registers those named below
from memopt.algebra.rows import Place
from memopt.facts import WORKSPACES
from memopt.kernels.codec import LIBRARY
from memopt.kernels.logits import chunk_bytes
from memopt.regions import Chunk, Region, above, chunk, part, put, sum_type

REGIONS: dict[str, Region] = {}  # of this process, by key; every capture finds the same ones again


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
