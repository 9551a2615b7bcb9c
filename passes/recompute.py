"""Recompute: run a forward step again just before its late reads, instead of keeping what it made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from memopt.edit import Remake
from memopt.graph import Step, StepGraph, once_a_graph
from memopt.passbase import Numerics, Trade
from memopt.solvers.blocks import Blocks, find_blocks

SHARED = 3  # a value read in so many blocks (a rotary table, a mask) is remade for each, not a boundary between two


@dataclass(frozen=True)
class Recompute(Trade):
    """Make a forward value again for each backward region that needs it. Assumes: pure steps, or random ones that
    read a saved seed and offset and are marked pure. Inputs, outputs and impure steps' values are never offered."""

    name, numerics = "recompute", Numerics.EXACT
    longest: float = math.inf  # seconds; slower steps are not offered

    def propose(self, graph: StepGraph, seconds: Mapping[str, float]) -> tuple[Remake, ...]:
        makers = {name: made for name, made in remakeable(graph).items() if cost(made, seconds) <= self.longest}
        blocks = find_blocks(graph)
        shared = shared_values(graph, blocks)
        offers = []
        for region in blocks.regions:
            if region is not None:
                span = (graph.steps[region[0]].name, graph.steps[region[1]].name)
                for value in needed(graph, blocks, makers, shared, region):
                    made = makers[value]
                    offers.append(Remake(self.name, value, span, made, seconds=cost(made, seconds)))
        return tuple(offers)


def cost(steps: Iterable[Step], seconds: Mapping[str, float]) -> float:
    """Seconds of running these steps once."""
    return sum(seconds.get(step.name, 0.0) for step in steps)


@once_a_graph
def remakeable(graph: StepGraph) -> dict[str, tuple[Step, ...]]:
    """Storage -> the one step that creates it, in the order of the graph.

    Left out: what the caller holds, and what an impure step touches by writing; other steps only look at it.
    """
    held = {*graph.input_storages, *graph.output_storages}
    found: dict[str, tuple[Step, ...]] = {}
    spoilt: set[str] = set()
    for step in graph.steps[: graph.boundary]:
        found.update((name, (step,)) for name in graph.created(step))
    for step in graph.steps:
        if not step.pure:
            spoilt.update(graph.storage_of(write) for write in step.writes)
    return {name: made for name, made in found.items() if name not in held and name not in spoilt}


def shared_values(graph: StepGraph, blocks: Blocks) -> set[str]:
    """Storages read in SHARED blocks or more."""
    readers: dict[str, set[int]] = {}
    for k, start in enumerate(blocks.starts):
        end = blocks.starts[k + 1] if k + 1 < len(blocks.starts) else graph.boundary
        for step in graph.steps[start:end]:
            for read in step.reads:
                readers.setdefault(graph.storage_of(read), set()).add(k)
    return {name for name, ks in readers.items() if len(ks) >= SHARED}


def needed(graph: StepGraph, blocks: Blocks, makers: Mapping[str, tuple[Step, ...]], shared: set[str],
           region: tuple[int, int]) -> Iterator[str]:  # fmt: skip
    """Values read in the region and, within each one's own block, what making them again reads; in graph order."""
    found: dict[str, None] = {}
    steps = (step for step in graph.steps[region[0] : region[1] + 1] if not graph.is_view(step))
    stack = [graph.storage_of(r) for step in steps for r in step.reads]
    while stack:
        value = stack.pop()
        if value in found or value not in makers:
            continue
        found[value] = None
        for read in (r for step in makers[value] for r in step.reads):
            base = graph.storage_of(read)
            if base in shared or blocks.of.get(base) == blocks.of[value]:
                stack.append(base)
    return iter(sorted(found, key=lambda name: (graph.uses[name][0], name)))
