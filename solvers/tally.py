"""What `edit` makes of remakes, in numbers: bytes and seconds of the edited step, and who uses what, without its graph.

A search weighs hundreds of plans, each of which leaves most steps as they are. The step is indexed once; of a plan only
what it changes is worked out. Copies are placed by `edit`'s own Placer, and what follows of them agrees with
`peak(edit(graph, chosen))` to the byte and with `added_seconds` to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.edit import Copy, Placer, Remake, Schedule, packs_of, workspace_again
from memopt.graph import Step
from memopt.plans import Plan, Problem, Status
from memopt.timeline import rounded

Numbers = NDArray[np.int64]


@dataclass(slots=True)
class Added:
    """A step that the edit adds before step `at` of the graph, or behind it. reads, writes: tensors, as renamed.

    storages: what it touches, by number. looks: whether it is a view. spare: whether it goes where nobody reads what it
    writes. cost: seconds. workspace: bytes, rounded."""

    step: Step
    at: int
    behind: bool
    reads: set[str]
    writes: list[str]
    storages: set[int]
    looks: bool
    spare: bool
    cost: float
    workspace: int


class Tally:
    """The index of one problem's step. Storages are numbers, in the order they are declared."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.graph = problem, problem.graph
        graph, steps, block = problem.graph, problem.graph.steps, problem.block
        self.number = {name: i for i, name in enumerate(graph.storages)}
        self.home = {name: self.number[info.storage] for name, info in graph.tensors.items()}
        self.size = [rounded(storage.nbytes, block) for storage in graph.storages.values()]
        self.uses: list[tuple[int, ...]] = [graph.uses.get(name, ()) for name in graph.storages]
        self.first = np.array([uses[0] if uses else -1 for uses in self.uses], np.int64)
        self.last = np.array([uses[-1] if uses else -1 for uses in self.uses], np.int64)
        self.given = np.array([self.number[name] for name in graph.input_storages], np.int64)
        self.lent = np.array([self.number[name] for name in graph.output_storages], np.int64)
        self.seconds = [problem.cost(step) for step in steps]
        self.cost = np.array(self.seconds)
        self.workspace = np.array([rounded(step.workspace, block) for step in steps], np.int64)
        self.again = [rounded(workspace_again(graph, step), block) for step in steps]
        self.fused = np.array([step.fused for step in steps], bool)
        self.looks = np.array([at in graph.viewing for at in range(len(steps))], bool)
        self.inlined = [at for at, step in enumerate(steps) if step.inlined]
        self.spare = [step.pure and not step.advances and bool(step.writes) for step in steps]
        self.readers = dict.fromkeys(graph.tensors, 0)
        for name in (*dict.fromkeys(graph.outputs), *(read for step in steps for read in dict.fromkeys(step.reads))):
            self.readers[name] += 1
        self.unread = [at for at, step in enumerate(steps) if not any(map(self.readers.get, step.writes))]

    def run(self, chosen: tuple[Remake, ...]) -> Tallied:
        """The step with these remakes, none of which copies while other steps run."""
        placer = Placer(self.graph, chosen)
        return Tallied(self, placer, placer.schedule(), chosen)

    def alone(self, step: Step) -> tuple[float, int]:
        """(seconds, bytes of workspace) of a step that runs once more, or for the first time."""
        at = self.graph.position.get(step.name)
        if at is None:
            return self.problem.cost(step), rounded(step.workspace, self.problem.block)
        return self.seconds[at], self.again[at]

    def plan(self, chosen: tuple[Remake, ...], solver: str) -> Plan:
        """As `memopt.plans.simulated`."""
        run, problem = self.run(chosen), self.problem
        holds = run.peak <= problem.budget and problem.allows(chosen)
        status = Status.FEASIBLE if holds else Status.INFEASIBLE
        return Plan(chosen, run.peak, run.seconds, 0.0, status, solver)


@dataclass
class Tallied:
    """One edited step. held: bytes at each of its steps. place: the original step each one is, or is made for.
    peak: bytes. seconds: added to the step."""

    base: Tally
    placer: Placer
    schedule: Schedule
    chosen: tuple[Remake, ...]
    held: Numbers = field(init=False)
    place: Numbers = field(init=False)
    peak: int = field(init=False)
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.home, self.size = dict(self.base.home), list(self.base.size)
        self._read_added()
        dead = self._unread()
        self._order(dead)
        self._index_uses(dead)
        born, last, kept = self._spans()
        delta, size = np.zeros(self.count + 2, np.int64), np.array(self.size, np.int64)[kept]
        np.add.at(delta, born[kept] + 1, size)
        np.subtract.at(delta, np.minimum(last[kept] + 2, self.count + 1), size)
        self.held = np.cumsum(delta)[1:-1] + self._in_order(self.base.workspace, [a.workspace for a in self.added])
        self.peak, self.kept = int(self.held.max()), kept
        cost = self._in_order(self.base.cost, [a.cost for a in self.added]).tolist()
        self.seconds = max(0.0, sum(cost) - self.base.problem.elapsed)  # in the order of `overlap.elapsed`

    # -- which steps there are --------------------------------------------------------------------------------------

    def _read_added(self) -> None:
        """What the edit adds, in order: copies, then what packs."""
        numbers, problem = dict[str, int](), self.base.problem
        for info, storage in (pair for remake in self.chosen for pair in remake.made):
            if storage.name not in numbers:
                numbers[storage.name] = self._new(rounded(storage.nbytes, problem.block))
            self.home[info.name] = numbers[storage.name]
        self.added = [
            self._copied(copy, at) for at in sorted(self.schedule.before) for copy in self.schedule.before[at]
        ]
        packs = packs_of(self.base.graph, self.chosen)
        self.added += [self._packing(step, at) for at, steps in packs.items() for step in steps.values()]

    def _new(self, size: int) -> int:
        self.size.append(size)
        return len(self.size) - 1

    def _copied(self, copy: Copy, at: int) -> Added:
        """A copy, its tensors declared: a written view lands in its base's new storage."""
        base, home, step, renamed = self.base, self.home, copy.step, copy.tensors
        lands: dict[int, int] = {}  # not dict[int, int](), which takes as long as the rest: this runs a million times
        reads: set[str] = set()
        looks = step.pure and bool(step.writes)
        for read in step.reads:
            new = renamed.get(read, read)
            reads.add(new)
            lands[home[read]] = home[new]
        for written in step.writes:
            old = base.home[written]
            if old not in lands:
                looks = False
                lands[old] = self._new(base.size[old])
            home[renamed[written]] = lands[old]
        cost, workspace = base.alone(step)
        cost = base.problem.seconds.get(copy.name, cost)
        spare = step.pure and bool(step.writes)  # a copy of a draw does not advance the generator
        writes = [renamed[written] for written in step.writes]
        return Added(step, at, False, reads, writes, set(lands.values()), looks, spare, cost, workspace)

    def _packing(self, step: Step, at: int) -> Added:
        """A step that packs, behind the one at `at`."""
        spare = step.pure and not step.advances and bool(step.writes)
        storages = {self.home[name] for name in (*step.reads, *step.writes)}
        cost, workspace = self.base.alone(step)
        return Added(step, at, True, {*step.reads}, [*step.writes], storages, False, spare, cost, workspace)

    def _reads(self, at: int) -> Sequence[str]:
        """What an original step reads now."""
        renamed, reads = self.schedule.reads.get(at), self.base.graph.steps[at].reads
        return [renamed.get(name, name) for name in reads] if renamed else reads

    def _unread(self) -> set[int]:
        """Steps that go since nobody reads what they write, as `edit.live_steps` has them; ~i is added step i."""
        steps, readers = self.base.graph.steps, dict(self.base.readers)
        made = {name: ~i for i, added in enumerate(self.added) for name in added.writes}
        for added in self.added:
            for name in added.reads:
                readers[name] = readers.get(name, 0) + 1
        asked = [*self.base.unread, *(~i for i in range(len(self.added)))]
        for renamed in self.schedule.reads.values():
            for old, new in renamed.items():
                readers[old] -= 1
                readers[new] = readers.get(new, 0) + 1
                asked.append(self.base.graph.producer[old])
        gone = set[int]()
        while asked:
            at = asked.pop()
            step = steps[at] if at >= 0 else self.added[~at]
            spare = self.base.spare[at] if isinstance(step, Step) else step.spare
            if at in gone or not spare or any([readers.get(name) for name in step.writes]):
                continue
            gone.add(at)
            for name in set(self._reads(at)) if isinstance(step, Step) else step.reads:
                readers[name] -= 1
                maker = made.get(name, self.base.graph.producer.get(name))
                if not readers[name] and maker is not None:
                    asked.append(maker)
        return gone

    # -- in which order ---------------------------------------------------------------------------------------------

    def _order(self, dead: set[int]) -> None:
        """Places of all that is left. at: edited position of each original step; of one that is dead nobody asks."""
        count = len(self.base.graph.steps)
        alive = np.ones(count, bool)
        alive[[at for at in dead if at >= 0]] = False
        self.steps = np.flatnonzero(alive)
        self.added = [added for i, added in enumerate(self.added) if ~i not in dead]
        beside = np.array([3 * added.at + 2 * added.behind for added in self.added], np.int64)
        self.order = np.argsort(np.concatenate((3 * self.steps + 1, beside)), kind="stable")
        self.count = len(self.order)
        places = np.empty(self.count, np.int64)
        places[self.order] = np.arange(self.count)
        at = np.full(count, -1, np.int64)
        at[self.steps] = places[: len(self.steps)]
        self.at, self.added_at = at, places[len(self.steps) :].tolist()
        originals = np.concatenate((self.steps, np.full(len(self.added), count - 1)))[self.order]
        self.place = np.minimum.accumulate(originals[::-1])[::-1]

    def _in_order(self, of_steps: NDArray[Any], of_added: Sequence[float]) -> NDArray[Any]:
        """Values of original and of added steps, by edited position."""
        return np.concatenate((of_steps[self.steps], np.array(of_added, of_steps.dtype)))[self.order]

    # -- who uses what ----------------------------------------------------------------------------------------------

    def _index_uses(self, dead: set[int]) -> None:
        """What original steps no longer touch, and what is touched that they did not."""
        graph, home = self.base.graph, self.home
        self.lost: dict[int, set[int]] = {}
        self.gained: dict[int, list[int]] = {}
        self.places = self.at.tolist()
        for at in (at for at in dead if at >= 0):
            for name in (*graph.steps[at].reads, *graph.steps[at].writes):
                self.lost.setdefault(home[name], set()).add(at)
        for at in self.schedule.reads.keys() - dead:
            step = graph.steps[at]
            now = {home[name] for name in (*self._reads(at), *step.writes)}
            before = {home[name] for name in (*step.reads, *step.writes)}
            for number in before - now:
                self.lost.setdefault(number, set()).add(at)
            for number in now - before:
                self.gained.setdefault(number, []).append(self.places[at])
        for place, added in zip(self.added_at, self.added, strict=True):
            for number in added.storages:
                self.gained.setdefault(number, []).append(place)

    def used(self, number: int) -> list[int]:
        """Edited positions that touch this storage, ascending."""
        new = self.gained.get(number, [])
        if number >= len(self.base.uses):
            return sorted(new)
        lost = self.lost.get(number)
        old = self.base.uses[number]
        kept = [self.places[at] for at in old if at not in lost] if lost else [self.places[at] for at in old]
        return sorted((*kept, *new)) if new else kept

    def _spans(self) -> tuple[Numbers, Numbers, Numbers]:
        """(born, last, kept): as `timeline.lifetimes`, by number, and which storages have a life."""
        base, end = self.base, self.count
        more = np.full(len(self.size) - len(base.size), -1, np.int64)
        first, last = (np.concatenate((np.where(one < 0, -1, self.at[one]), more)) for one in (base.first, base.last))
        for number in self.lost.keys() | self.gained.keys():
            uses = self.used(number)
            first[number], last[number] = (uses[0], uses[-1]) if uses else (-1, -1)
        self.fused = self._in_order(base.fused, [added.step.fused for added in self.added])
        born = first + np.where(first < 0, 0, self.fused[first])
        kept = (first >= 0) & (born <= last)
        born[base.lent] = np.where(kept[base.lent], born[base.lent], first[base.lent])
        born[base.given] = -1
        for held in (base.given, base.lent):
            last[held], kept[held] = end, True
        self._vanish(born, last, kept)
        return born, last, np.flatnonzero(kept)

    def _vanish(self, born: Numbers, last: Numbers, kept: NDArray[np.bool_]) -> None:
        """What is inlined in its readers has no life; what it is made of lives until the last of them."""
        steps, home = self.base.graph.steps, self.home
        inlined = [(self.places[at], [*self._reads(at)], [*steps[at].writes]) for at in self.base.inlined]
        added = zip(self.added_at, self.added, strict=True)
        inlined += [(at, [*step.reads], step.writes) for at, step in added if step.step.inlined]
        looks = self._looks() if inlined else np.zeros(0, bool)
        for _, reads, writes in sorted(item for item in inlined if item[0] >= 0):
            read = {home[name] for name in reads}
            made = {home[name] for name in writes} - read
            uses = [at for number in made for at in self.used(number)[1:]]
            readers = [at for at in uses if not looks[at]]
            if readers and self.fused[readers].all():
                kept[list(made)] = False
                last[list(read)] = np.maximum(last[list(read)], max(uses))

    def _looks(self) -> NDArray[np.bool_]:
        """Whether each edited step is a view."""
        return self._in_order(self.base.looks, [added.looks for added in self.added])

    def stays(self, values: Collection[str]) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
        """Each stay of these values in memory: (value, the remake that made it or None for the original, edited
        positions that use it, its making first; views are made anew for who reads them)."""
        looks, graph = self._looks().tolist(), self.base.graph
        copied = {self.home[copy]: (graph.storage_of(tensor), index)
                  for (tensor, index), copy in self.placer.copies.items()}  # fmt: skip
        stay: Iterable[tuple[int, tuple[str, int | None]]] = (
            *((self.base.number[value], (value, None)) for value in values), *copied.items(),
        )  # fmt: skip
        kept = set(self.kept.tolist())
        for number, (value, index) in stay:
            if number in kept and value in values:
                made, *uses = self.used(number)
                yield value, index, (made, *(at for at in uses if not looks[at]))
