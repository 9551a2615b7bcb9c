"""Dynamic tensor rematerialisation, run offline: Kirisame et al., arXiv:2006.09616.

The step is played in order under a byte limit. Before a run that does not fit, storages are let go, always the one of
least h = cost / (bytes * staleness), until it does; what is read and gone is made again on demand, recursively. cost
is that of making the storage again plus that of its evicted neighbourhood, kept in union-find classes (the paper's
h_DTR-eq, appendix C); staleness is the time since its last use. As in the paper's prototype, a storage the step no
longer needs is let go at once, and tiny ones (below 1 % of the mean, appendix E) are not looked at.

Storages the forward makes may go; those of the backward stay, as every plan here runs each backward step once. The
trace it plays is the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from benchmarks.planners.answer import Answer
from benchmarks.planners.export import Work
from benchmarks.planners.schedule import GIVEN, Run, Schedule, is_anchor, steps_of
from benchmarks.planners.simulator import up, workspace
from memopt.graph import Step

SMALL = 0.01  # of the mean size of a storage
THRASH = 6.0  # times the step's own seconds, after which a run is given up
DEPTH = 100_000  # makings a single read may start


class OutOfMemory(Exception):
    """Nothing is left to let go, or the trace thrashes."""


@dataclass
class Classes:
    """Union-find over evicted storages; each class carries the seconds of making all of it again."""

    parent: dict[str, str] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)

    def find(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def add(self, name: str, cost: float, near: Iterable[str]) -> None:
        """A newly evicted storage, joined with its evicted neighbours."""
        self.parent[name], self.cost[name] = name, cost
        for other in near:
            a, b = self.find(name), self.find(other)
            if a != b:
                self.parent[b] = a
                self.cost[a] += self.cost[b]

    def drop(self, name: str, cost: float) -> None:
        """A storage made again: its cost is taken off its class, which is not split (the paper's approximation)."""
        self.cost[self.find(name)] -= cost


def dtr(work: Work, budget: int) -> Answer:
    """The trace under the budget as limit, or why there is none."""
    try:
        return Answer(Play(work, budget).trace())
    except OutOfMemory as stopped:
        return Answer(None, note=str(stopped))


class Play:
    """One run of the step under a limit. held: storage -> bytes of those alive; where: tensor -> run that made it."""

    def __init__(self, work: Work, limit: int) -> None:
        self.work, self.graph, self.limit = work, work.graph, limit
        self.steps = steps_of(self.graph)
        self.size = {name: up(storage.nbytes, work.block) for name, storage in self.graph.storages.items()}
        self.held = {name: self.size[name] for name in self.graph.input_storages}
        self.alive = sum(self.held.values())
        self.where = dict.fromkeys(self.graph.inputs, GIVEN)
        self.runs, self.ran = list[Run](), set[str]()
        self.clock, self.used = 0.0, dict[str, float]()
        self.locks: dict[str, int] = {}
        self.maker, self.near, self.views = self.relations()
        self.cost = {name: work.seconds.get(maker, 0.0) for name, maker in self.maker.items()}
        self.classes, self.gone = Classes(), set[str]()
        self.free = self.evictable()
        self.tiny = SMALL * sum(self.size[n] for n in self.free) / max(len(self.free), 1)
        self.most = THRASH * sum(work.seconds.values())

    def relations(self) -> tuple[dict[str, str], dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        """Storage -> its maker; -> storages its making reads or whose making reads it; -> its tensors."""
        maker: dict[str, str] = {}
        near: dict[str, dict[str, None]] = {}
        tensors: dict[str, list[str]] = {}
        for step in self.graph.steps:
            for name in step.writes:
                tensors.setdefault(self.graph.storage_of(name), []).append(name)
            for made in self.graph.created(step):
                maker[made] = step.name
                for read in {self.graph.storage_of(name) for name in step.reads}:
                    near.setdefault(made, {})[read] = None
                    near.setdefault(read, {})[made] = None
        return maker, {n: tuple(sorted(of)) for n, of in near.items()}, {n: tuple(of) for n, of in tensors.items()}

    def evictable(self) -> frozenset[str]:
        """Storages a pure forward step makes and nothing changes; not what the caller gets."""
        graph, fixed = self.graph, {*self.graph.output_storages, *self.graph.input_storages}
        for step in graph.steps:
            if not step.pure:
                fixed.update(graph.storage_of(name) for name in step.writes)
        pure = (step for step in graph.steps[: graph.boundary] if step.pure)
        return frozenset(name for step in pure for name in graph.created(step) if name not in fixed)

    def last_needed(self) -> dict[str, int]:
        """Storage -> position after which it may go. What cannot be made again (a generator's state) stays while
        something that is made from it may have to be."""
        last = {name: uses[-1] for name, uses in self.graph.uses.items()}
        needed = dict(last)
        for step in reversed(self.graph.steps[: self.graph.boundary]):
            latest = max((needed[made] for made in self.graph.created(step) if made in self.free), default=-1)
            for read in {self.graph.storage_of(name) for name in step.reads}:
                needed[read] = max(needed[read], latest)
        return {name: last[name] if name in self.free else at for name, at in needed.items()}

    def trace(self) -> Schedule:
        """Play the whole step."""
        last = self.last_needed()
        keep = {*self.graph.input_storages, *self.graph.output_storages}
        ending: dict[int, list[str]] = {}
        for name, at in last.items():
            ending.setdefault(at, []).append(name)
        for at, step in enumerate(self.graph.steps):
            if is_anchor(self.graph, step) or step.phase == "forward" or any(n not in self.where for n in step.writes):
                self.perform(step)
            for name in ending.get(at, ()):
                if name not in keep and name in self.held:
                    self.let_go(name)
        return tuple(self.runs)

    def perform(self, step: Step) -> None:
        """Run a step of the program: its reads first, where they are gone."""
        stack: list[tuple[Step, bool]] = [(step, False)]
        count = 0
        while stack:
            count += 1
            todo, ready = stack.pop()
            if todo is not step and all(name in self.where for name in todo.writes):
                if ready:
                    self.unlock(todo)
                continue
            if not ready:
                self.lock(todo)
                stack.append((todo, True))
                missing = (name for name in todo.reads if name not in self.where)
                stack.extend((self.steps[self.producer(name)], False) for name in dict.fromkeys(missing))
            elif lost := [name for name in todo.reads if name not in self.where]:
                stack.append((todo, True))  # let go again while another read was made
                stack.extend((self.steps[self.producer(name)], False) for name in dict.fromkeys(lost))
            else:
                self.run(todo)
                self.unlock(todo)
            if count > DEPTH or self.clock > self.most:
                raise OutOfMemory(f"gave up at {step.name}: remaking takes over {THRASH - 1:.0f} times the step")

    def producer(self, tensor: str) -> str:
        return self.graph.steps[self.graph.producer[tensor]].name

    def lock(self, step: Step) -> None:
        for name in {self.graph.storage_of(read) for read in step.reads}:
            self.locks[name] = self.locks.get(name, 0) + 1

    def unlock(self, step: Step) -> None:
        for name in {self.graph.storage_of(read) for read in step.reads}:
            self.locks[name] -= 1

    def run(self, step: Step) -> None:
        """One run: room is made, its new storages live, their tensors are where it made them."""
        made, scratch = self.graph.created(step), workspace(self.graph, step, step.name in self.ran)
        self.make_room(sum(self.size[name] for name in made) + up(scratch, self.work.block))
        self.ran.add(step.name)
        self.runs.append(Run(step.name, tuple(self.where[name] for name in step.reads)))
        self.clock += self.work.seconds.get(step.name, 0.0)
        for name in made:
            if name not in self.held:
                self.held[name] = self.size[name]
                self.alive += self.size[name]
                if name in self.gone:
                    self.gone.discard(name)
                    self.classes.drop(name, self.cost[name])
        fresh = {name for name in step.writes if name not in self.where}
        self.where.update(dict.fromkeys(fresh, len(self.runs) - 1))
        self.used.update(dict.fromkeys(self.graph.touched(step), self.clock))

    def make_room(self, wanted: int) -> None:
        """Let storages go, least h first, until `wanted` bytes fit."""
        while self.alive + wanted > self.limit:
            found = min(self.candidates(), default=None)
            if found is None:
                raise OutOfMemory(f"out of memory by {self.alive + wanted - self.limit} bytes: nothing left to let go")
            self.let_go(found[1])

    def candidates(self) -> Iterator[tuple[float, str]]:
        """(h, storage) of what may go now; tiny ones only when nothing else is there."""
        able = [n for n in self.held if n in self.free and not self.locks.get(n, 0)]
        large = [name for name in able if self.size[name] >= self.tiny] or able
        return ((self.score(name), name) for name in large)

    def score(self, name: str) -> float:
        stale = max(self.clock - self.used[name], 1e-9)
        roots = {self.classes.find(other) for other in self.near.get(name, ()) if other in self.gone}
        cost = self.cost[name] + sum(self.classes.cost[root] for root in roots)
        return cost / (max(self.size[name], 1) * stale)

    def let_go(self, name: str) -> None:
        """A storage and all tensors in it."""
        self.alive -= self.held.pop(name)
        for tensor in self.views[name]:
            self.where.pop(tensor, None)
        if name in self.free:
            self.gone.add(name)
            self.classes.add(
                name, self.cost[name], (o for o in self.near.get(name, ()) if o in self.gone and o != name)
            )
