"""Where a step falls into blocks, by its structure alone: cheap places to cut the forward, and their backward regions.

A cut stands where few activation bytes cross from one forward step to the next: a valley of the crossing bytes, as
at the end of a residual branch. Neighbouring blocks that repeat with a period (attention, MLP, attention, ...) are
merged into one period, found by equal `Step.key`s. No name is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memopt.graph import StepGraph, once_a_graph

VALLEY = 0.75  # a cut crosses at most this share of the smaller of the two ridges beside it

WORTH = 4.0  # a finer cut's block saves at least so many times the bytes that newly cross it


@dataclass(frozen=True)
class Blocks:
    """of: storage made in the forward -> its block. starts: first forward position of each block.

    regions: per block the positions (first, last) of its backward work, None if it has none; they are disjoint, and
    together cover everything from the loss to the end of the step.
    """

    starts: tuple[int, ...]
    of: dict[str, int]
    regions: tuple[tuple[int, int] | None, ...]


def crossing(graph: StepGraph) -> list[int]:
    """Bytes of forward activations made by a step up to t and touched by a forward step after t, for each t."""
    delta = [0] * (graph.boundary + 1)
    given = set(graph.input_storages)
    for name, uses in graph.uses.items():
        if name not in given and uses[0] < graph.boundary:
            last = max(at for at in uses if at < graph.boundary)
            delta[uses[0]] += graph.storages[name].nbytes
            delta[last] -= graph.storages[name].nbytes
    held, out = 0, []
    for change in delta[: graph.boundary]:
        held += change
        out.append(held)
    return out


def valleys(height: Sequence[int], share: float = VALLEY) -> list[int]:
    """Positions of minima with a ridge on both sides that is at least 1/share as high, ascending.

    The first position of equally low ones, except that a valley reached again before a ridge moves forward.
    """
    found: list[int] = []
    low: int | None = None
    ridge = 0
    for at, value in enumerate(height):
        if low is None:
            ridge = max(ridge, value)
            if value <= share * ridge:
                low = at
        elif value <= height[low]:
            low = at
        elif value * share >= height[low]:
            found.append(low)
            low, ridge = None, value
    return found


def refined(cuts: Sequence[int], graph: StepGraph) -> list[int]:
    """Cut blocks that hold more than a quarter of what the backward reads, also where nothing rises between steps.

    In a plain chain every step is a place to cut; one is taken when what the block so far would give back is at
    least WORTH times what newly crosses the cut (else boundaries would cost what their blocks save).
    """
    saved, born = [0] * graph.boundary, dict[int, list[str]]()
    for name, uses in graph.uses.items():
        if uses[0] < graph.boundary and name not in graph.input_storages:
            born.setdefault(uses[0], []).append(name)
            saved[uses[0]] += graph.storages[name].nbytes if uses[-1] >= graph.boundary else 0
    out, starts = [*cuts], [0, *(cut + 1 for cut in cuts)]
    for a, b in zip(starts, [*starts[1:], graph.boundary], strict=True):
        if sum(saved[a:b]) * 4 > sum(saved):
            out.extend(cut for cut in finer(graph, a, b, saved, born))
    return sorted(out)


def finer(graph: StepGraph, first: int, end: int, saved: list[int], born: dict[int, list[str]]) -> list[int]:
    """Places to cut between two forward positions; see refined."""
    cuts: list[int] = []
    start, total = first, 0
    last = {
        n: max(u for u in graph.uses[n] if u < graph.boundary) for at in range(first, end) for n in born.get(at, ())
    }
    for at in range(first, end - 1):
        total += saved[at]
        fresh = [n for b in range(start, at + 1) for n in born.get(b, ()) if last[n] > at]
        near = sum(graph.storages[n].nbytes for n in fresh)
        if near and total >= WORTH * near and any(n in graph.created(graph.steps[at]) for n in fresh):
            cuts.append(at)
            start, total = at + 1, 0
    return cuts


def merged(cuts: Sequence[int], graph: StepGraph) -> list[int]:
    """Drop cuts inside a repeating period: of blocks A B A B A B, keep those before each A."""
    starts = [0, *(cut + 1 for cut in cuts)]
    ends = [*starts[1:], graph.boundary]
    hashes = [hash_of(graph, a, b) for a, b in zip(starts, ends, strict=True)]
    equal = {p: [i for i in range(len(hashes) - p) if hashes[i] == hashes[i + p]] for p in range(1, 9)}
    best = max(equal, key=lambda p: (len(equal[p]) * (1 if p == 1 else 0.9), -p))
    if best == 1 or len(equal[best]) < 2 * best:
        return list(cuts)
    first, last = equal[best][0], equal[best][-1] + best
    dropped = {starts[i] for i in range(first, last + 1) if (i - first) % best}
    return [cut for cut in cuts if cut + 1 not in dropped]


def hash_of(graph: StepGraph, first: int, end: int) -> tuple[str, ...]:
    """What makes two blocks equal: their steps' operations, shapes and constants, in order."""
    return tuple(step.key or step.op for step in graph.steps[first:end])


@once_a_graph
def find_blocks(graph: StepGraph) -> Blocks:
    """Blocks of the forward and their regions. A step without forward or backward is one block without a region."""
    starts = [0, *(cut + 1 for cut in merged(refined(valleys(crossing(graph)), graph), graph))]
    block_at = [0] * graph.boundary
    for k, (a, b) in enumerate(zip(starts, [*starts[1:], graph.boundary], strict=True)):
        block_at[a:b] = [k] * (b - a)
    given = set(graph.input_storages)
    of = {
        name: block_at[uses[0]]
        for name, uses in graph.uses.items()
        if name not in given and uses and uses[0] < graph.boundary
    }
    return Blocks(tuple(starts), of, regions(graph, of, len(starts)))


def regions(graph: StepGraph, of: dict[str, int], count: int) -> tuple[tuple[int, int] | None, ...]:
    """Region k ends with the last step that reads a value of block k or later; the first block's ends the step."""
    ends = [-1] * count
    for name, block in of.items():
        ends[block] = max(ends[block], graph.uses[name][-1])
    ends[0] = len(graph.steps) - 1
    found: list[tuple[int, int] | None] = [None] * count
    start = graph.boundary
    for k in reversed(range(count)):
        if ends[k] >= start:
            found[k] = (start, ends[k])
            start = ends[k] + 1
    return tuple(found)
