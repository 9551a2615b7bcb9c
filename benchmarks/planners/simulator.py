"""The judge: peak bytes and seconds of a schedule. Written apart from memopt's own accounting, small and obvious.

A run brings to life the storages its step writes and does not read; a view or an in-place write lands in the storage
of what it read. Three moments a run: outputs and workspace are allocated, it runs, what nobody reads later is freed.
Inputs and outputs are held throughout. Left out, for everybody: fragmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.planners.schedule import GIVEN, Schedule, final_runs, steps_of
from memopt.graph import Step, StepGraph


@dataclass(frozen=True)
class Score:
    """peak: bytes. seconds: of all runs. held: bytes while each run runs."""

    peak: int
    seconds: float
    held: tuple[int, ...]


@dataclass
class Block:
    """One allocation: its bytes as the allocator rounds them, the run that makes it and the last that touches it."""

    nbytes: int
    born: int
    last: int


def simulate(graph: StepGraph, seconds: Mapping[str, float], schedule: Schedule, block: int = 1) -> Score:
    """Score a schedule. block: bytes an allocation is rounded up to."""
    steps = steps_of(graph)
    blocks = allocations(graph, schedule, block)
    held = [0] * len(schedule)
    resident = sum(b.nbytes for b in blocks if b.born == GIVEN)
    freed: dict[int, int] = {}
    for b in blocks:
        if b.born != GIVEN:
            held[b.born] += b.nbytes
            freed[b.last] = freed.get(b.last, 0) + b.nbytes
    alive, seen = resident, set[str]()
    for at, run in enumerate(schedule):
        alive += held[at]
        held[at] = alive + up(workspace(graph, steps[run.step], run.step in seen), block)
        alive -= freed.get(at, 0)
        seen.add(run.step)
    return Score(max(held, default=resident), sum(seconds.get(run.step, 0.0) for run in schedule), tuple(held))


def allocations(graph: StepGraph, schedule: Schedule, block: int = 1) -> list[Block]:
    """Every allocation of a schedule, the inputs' first. Those of inputs and outputs end behind the last run."""
    end, steps = len(schedule), steps_of(graph)
    given = {name: Block(up(graph.storages[name].nbytes, block), GIVEN, end) for name in graph.input_storages}
    blocks = list(given.values())
    made: list[dict[str, Block]] = []  # per run: storage -> the allocation its outputs lie in
    for at, run in enumerate(schedule):
        step = steps[run.step]
        homes = {
            graph.storage_of(name): given[graph.storage_of(name)] if r == GIVEN else made[r][graph.storage_of(name)]
            for name, r in zip(step.reads, run.reads, strict=True)
        }
        for name in dict.fromkeys(graph.storage_of(write) for write in step.writes):
            if name not in homes:
                homes[name] = Block(up(graph.storages[name].nbytes, block), at, at)
                blocks.append(homes[name])
        for home in homes.values():
            home.last = max(home.last, at)
        made.append(homes)
    for name, maker in final_runs(graph, schedule).items():
        if maker != GIVEN:
            made[maker][graph.storage_of(name)].last = end
    return blocks


def workspace(graph: StepGraph, step: Step, again: bool) -> int:
    """Bytes a run takes and gives back. A draw made again holds the generator's state besides, which it reads first:
    it puts the generator back as it was."""
    return step.workspace + (graph.bytes_of(step.reads[:1]) if again and step.advances else 0)


def up(nbytes: int, block: int) -> int:
    """Bytes rounded up to whole blocks."""
    return (nbytes + block - 1) // block * block
