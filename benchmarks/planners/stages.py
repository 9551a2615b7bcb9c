"""The step as a chain of stages, for planners that know only chains: Chen's, ROTOR, Checkmate's blocks, sac_milp.

A stage is a block of the forward (memopt.solvers.blocks: where few bytes cross; layers, for a transformer) and the
stretch of the backward that needs its values. Blocks without a backward join the next one. What a later stage than the
next one reads (skips, rotary tables) is taken to be kept: no chain planner can do otherwise. Bytes as the allocator
rounds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.planners.export import Work
from benchmarks.planners.keep_all import unchanged
from benchmarks.planners.schedule import Schedule, explicit, pruned
from benchmarks.planners.simulator import allocations, simulate, up
from memopt.graph import Step
from memopt.solvers.blocks import find_blocks


@dataclass(frozen=True)
class Stage:
    """Half-open ranges of positions: forward [first, last), backward [begin, end)."""

    first: int
    last: int
    begin: int
    end: int


@dataclass(frozen=True)
class Sizes:
    """Of one stage, bytes. passing: most held while its forward runs and only what it hands on is kept; keeping: while
    it runs and all saved values are kept (neither counts the stage's own input). late: most held while its backward
    runs, less saved values of this stage and the earlier ones, what is fixed and what is resident. start: gradients
    held just before it. The optimizer is in none."""

    passing: int
    keeping: int
    late: int
    start: int


@dataclass(frozen=True)
class Chain:
    """The stages in the order of the forward, and the work they were made of."""

    work: Work
    stages: tuple[Stage, ...]

    def forward(self, at: int) -> Sequence[Step]:
        """Steps of the stage's forward."""
        return self.work.graph.steps[self.stages[at].first : self.stages[at].last]

    def backward(self, at: int) -> Sequence[Step]:
        """Steps of the stage's backward (the first stage's goes on to the end of the step)."""
        return self.work.graph.steps[self.stages[at].begin : self.stages[at].end]

    def again(self, at: int) -> Iterator[str]:
        """Names of the stage's forward steps that may run a second time."""
        return (step.name for step in self.forward(at) if step.pure)

    def seconds(self, steps: Iterable[Step]) -> float:
        return sum(self.work.seconds.get(step.name, 0.0) for step in steps)

    @cached_property
    def of(self) -> dict[str, int]:
        """Storage a forward step makes -> its stage."""
        found: dict[str, int] = {}
        for at in range(len(self.stages)):
            for step in self.forward(at):
                found.update(dict.fromkeys(self.work.graph.created(step), at))
        return found

    def size(self, storage: str) -> int:
        return up(self.work.graph.storages[storage].nbytes, self.work.block)

    @cached_property
    def fixed(self) -> frozenset[str]:
        """Storages no chain planner lets go of: outputs, what steps that run once make or change, and what is read
        by the forward of a later stage than the next, and again in the backward."""
        graph, found = self.work.graph, set(self.work.graph.output_storages)
        for step in graph.steps[: graph.boundary]:
            if not step.pure:
                found.update(graph.storage_of(name) for name in step.writes)
        for at in range(len(self.stages)):
            read = {graph.storage_of(name) for step in self.forward(at) for name in step.reads}
            found.update(name for name in read if name in self.of and self.of[name] < at - 1)
        late = self.late
        return frozenset(name for name in found if name in self.of and name in late)

    @cached_property
    def late(self) -> frozenset[str]:
        """Forward storages that the backward reads, or that a stage needs to be run again."""
        graph = self.work.graph
        read = {graph.storage_of(name) for step in graph.steps[graph.boundary :] for name in step.reads}
        for at in range(len(self.stages)):
            mine = {graph.storage_of(name) for step in self.forward(at) for name in step.reads}
            read |= {name for name in mine if self.of.get(name, at) < at}
        return frozenset(name for name in read if name in self.of)

    def crossing(self, at: int) -> frozenset[str]:
        """What stage `at` hands to the next: read by its forward, not fixed."""
        return self._crossing[at]

    def saved(self, at: int) -> frozenset[str]:
        """What the backward reads of stage `at`, and what it hands on; not what is fixed."""
        return self._saved[at]

    @cached_property
    def _crossing(self) -> tuple[frozenset[str], ...]:
        graph, found = self.work.graph, list[frozenset[str]]()
        for at in range(1, len(self.stages)):
            read = {graph.storage_of(name) for step in self.forward(at) for name in step.reads}
            found.append(frozenset(name for name in read if self.of.get(name) == at - 1) - self.fixed)
        return (*found, frozenset())

    @cached_property
    def _saved(self) -> tuple[frozenset[str], ...]:
        graph, mine = self.work.graph, [set(given) for given in self._crossing]
        for step in graph.steps[graph.boundary :]:
            for storage in (graph.storage_of(name) for name in step.reads):
                if storage in self.of and storage not in self.fixed:
                    mine[self.of[storage]].add(storage)
        return tuple(frozenset(names) for names in mine)

    @cached_property
    def sizes(self) -> tuple[Sizes, ...]:
        """Of each stage, measured on the unchanged step: forwards by themselves, backwards by what is held besides
        saved values."""
        return tuple(measured(self))

    def bytes_of(self, storages: Iterable[str]) -> int:
        return sum(self.size(name) for name in storages)


def chain_of(work: Work) -> Chain:
    """The work as a chain; a step without a backward is one stage."""
    graph, blocks = work.graph, find_blocks(work.graph)
    ends = [*blocks.starts[1:], graph.boundary]
    first, stages = 0, list[Stage]()
    for end, region in zip(ends, blocks.regions, strict=True):
        if region is not None:
            stages.append(Stage(first, end, region[0], region[1] + 1))
            first = end
    if stages and first < graph.boundary:  # what follows the last block with a backward joins it
        last = stages[-1]
        stages[-1] = Stage(last.first, graph.boundary, last.begin, last.end)
    return Chain(work, tuple(stages) or (Stage(0, graph.boundary, graph.boundary, len(graph.steps)),))


def joined(chain: Chain, most: int) -> Chain:
    """The chain with neighbours joined so that at most so many stages are left, of about equal saved bytes each."""
    stages, weights = list(chain.stages), [chain.bytes_of(chain.saved(at)) for at in range(len(chain.stages))]
    while len(stages) > most:
        at = min(range(len(stages) - 1), key=lambda i: (weights[i] + weights[i + 1], i))
        a, b = stages[at], stages[at + 1]
        stages[at : at + 2] = [Stage(a.first, b.last, b.begin, a.end)]
        weights[at : at + 2] = [weights[at] + weights[at + 1]]
    return Chain(chain.work, tuple(stages))


def measured(chain: Chain) -> Iterator[Sizes]:
    """The sizes of each stage."""
    work, below = chain.work, chain.bytes_of(chain.fixed) + resident(chain)
    schedule, end = unchanged(work), optimizer_of(chain)
    held = simulate(work.graph, work.seconds, schedule, work.block).held
    late = [b for b in allocations(work.graph, schedule, work.block) if b.born >= work.graph.boundary]
    for at, stage in enumerate(chain.stages):
        below += chain.bytes_of(chain.saved(at))
        most = max(held[stage.begin : min(stage.end, end)], default=below) - below
        start = sum(b.nbytes for b in late if b.born < stage.begin <= b.last)
        yield Sizes(alone(chain, at, chain.crossing(at)), alone(chain, at, chain.saved(at)), most, start)


def optimizer_of(chain: Chain) -> int:
    """Position of the first step of the optimizer, or the number of steps."""
    steps = chain.work.graph.steps
    return next((at for at, step in enumerate(steps) if step.phase == "optimizer"), len(steps))


def resident(chain: Chain) -> int:
    """Bytes of the inputs."""
    return chain.bytes_of(chain.work.graph.input_storages)


def alone(chain: Chain, at: int, kept: frozenset[str]) -> int:
    """Most bytes of its own that the stage's forward holds while it runs, when `kept` outlives it."""
    graph, steps = chain.work.graph, chain.forward(at)
    last: dict[str, int] = {}
    for place, step in enumerate(steps):
        last.update(dict.fromkeys(graph.touched(step), place))
    alive = most = 0
    for place, step in enumerate(steps):
        mine = [n for n in dict.fromkeys(graph.touched(step)) if chain.of.get(n) == at and n not in chain.fixed]
        alive += chain.bytes_of(n for n in mine if n in graph.created(step))
        most = max(most, alive + step.workspace)
        alive -= chain.bytes_of(n for n in mine if last[n] == place and n not in kept)
    return most


def sequence(chain: Chain, remade: Mapping[int, Sequence[int]]) -> tuple[str, ...]:
    """Step names when, before the backward of stage i, the forwards of the stages `remade[i]` run again."""
    names = [step.name for step in chain.work.graph.steps[: chain.work.graph.boundary]]
    for at in reversed(range(len(chain.stages))):
        for again in remade.get(at, ()):
            names.extend(chain.again(again))
        names.extend(step.name for step in chain.backward(at))
    return tuple(names)


def schedule_of(chain: Chain, names: Sequence[str]) -> Schedule:
    """The names as a schedule, without runs nobody reads."""
    return pruned(chain.work.graph, explicit(chain.work.graph, names))
