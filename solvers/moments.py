"""When the copies of a plan's moves begin and are waited for: as little waiting as the bytes left over can hide.

In: a problem and remakes of it, whose moves have no moments. Out, by `timed`: a plan of them, simulated by `edit`.
Moments are placed greedily, one copy after the other, and are not proven to be the best ones.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from memopt.edit import DISK, HOST, TOKEN, Placer, Remake, edit, packed_behind, program, taken
from memopt.graph import Step, StepGraph
from memopt.overlap import moves, overlapped
from memopt.plans import Plan, Problem, original, simulated
from memopt.timeline import lifetimes, live_after, rounded, timeline


def rank(problem: Problem, plan: Plan) -> tuple[bool, float, float]:
    """The plans within the budget come first, then the cheaper, then those that move less."""
    moved = sum(amount for resource, amount in taken(plan.chosen).items() if resource in (DISK, HOST))
    return plan.peak > problem.budget, plan.seconds, moved


def timed(problem: Problem, chosen: Sequence[Remake]) -> Plan:
    """The plan of these remakes with moments for their copies, or with copies awaited at once where that is cheaper."""
    chosen = wanted(problem.graph, chosen)
    awaited = simulated(problem, chosen, "awaited")
    begun = just_in_time(problem.graph, chosen)
    if not any(remake.drained for remake in begun):
        return awaited
    plan = simulated(problem, Moments(problem, begun).chosen(), "overlapped")
    return min(awaited, plan, key=lambda p: rank(problem, p))


def wanted(graph: StepGraph, chosen: Sequence[Remake]) -> tuple[Remake, ...]:
    """The remakes without moves that bring nothing back, of what others move too. All moves of a value, or of one part,
    share one copy out, so one without moments of its own would leave the others without a beginning. Where its value
    is made in passing, by a step that runs again for another, it becomes a remake by that step.
    """
    placer = Placer(graph, chosen)
    before = placer.schedule().before.values()
    made = {copy.tensors[name]: copy.step for copied in before for copy in copied for name in copy.step.writes}
    makers = [made.get(placer.copies.get((remake.value, at), "")) for at, remake in enumerate(chosen)]
    back = {r.pack[0].name for r, maker in zip(chosen, makers, strict=True) if moves(r) and maker in r.unpack}
    out = []
    for remake, maker in zip(chosen, makers, strict=True):
        if not moves(remake) or maker in remake.unpack or remake.pack[0].name not in back:
            out.append(remake)
        elif maker is not None:
            again = next(r for r in chosen if maker in r.unpack)
            out.append(replace(again, value=remake.value, span=remake.span))
    return tuple(out)


def just_in_time(graph: StepGraph, chosen: Sequence[Remake]) -> tuple[Remake, ...]:
    """The remakes with each move as it is awaited at once: drained where it is packed, fetched by the first reader."""
    placer = Placer(graph, chosen)
    before = placer.schedule().before
    reader = {copy.name: graph.steps[at].name for at, copied in before.items() for copy in copied}
    out = []
    for index, remake in enumerate(chosen):
        first = reader.get(placer.copies.get((remake.value, index), ""))
        behind = graph.steps[packed_behind(graph, remake)].name
        out.append(overlapped(remake, behind, first) if first and moves(remake) else remake)
    return tuple(out)


@dataclass(frozen=True)
class Way:
    """A copy of a remake's value. direction: 1 out, whose wait moves later; -1 back, which begins earlier. beside: the
    step it stands at now. alone: the moment from which on nobody but the copy holds the value."""

    direction: int
    remake: Remake
    beside: str
    alone: int = 0


class Moments:
    """Moves drains later and fetches earlier, while the bytes of the step as it stands leave room.

    graph: the step with all copies awaited at once. free: bytes left under the budget at each of its moments: 2k is
    while step k runs, 2k + 1 once it has run, where copies begin and are waited for; by then what a fused step made is
    in no other value's place any more. clock: seconds before each step, copies taking none. side: phase and program of
    the steps that a copy may be put behind or before. drained: the name of a copy out -> step; fetched: remake -> step.
    """

    def __init__(self, problem: Problem, remakes: Sequence[Remake]) -> None:
        self.problem, self.remakes = problem, remakes
        self.graph = edit(problem.graph, remakes)
        self.steps = self.graph.steps
        held = zip(timeline(self.graph, problem.block), live_after(self.graph, problem.block), strict=True)
        self.free = [problem.budget - nbytes for both in held for nbytes in both]
        copied = {step.name for remake in remakes if remake.drained for step in (*remake.pack, *remake.unpack)}
        costs = (0.0 if copied & {s.name, original(s.name)} else self.cost(s) for s in self.steps)
        self.clock = list(accumulate(costs, initial=0.0))
        real = problem.graph.position
        lasts = (s.name in real and s.pure and not self.graph.is_view(s) for s in self.steps)
        self.side = [(s.phase, program(s.name)) if here else None for s, here in zip(self.steps, lasts, strict=True)]
        self.drained: dict[str, str] = {}
        self.fetched: dict[int, str] = {}

    def cost(self, step: Step) -> float:
        seconds = self.problem.seconds
        return seconds.get(step.name, seconds.get(original(step.name), 0.0))

    def chosen(self) -> tuple[Remake, ...]:
        """The remakes with their moments."""
        self.drain()
        self.fetch()
        return tuple(
            overlapped(r, self.drained[r.pack[0].name], self.fetched[at]) if r.drained else r
            for at, r in enumerate(self.remakes)
        )

    def drain(self) -> None:
        """In the order values are made: wait at the first moment at which the copy has ended, or at the last that there
        is room for. What is then still waited for puts the rest of the forward behind the clock."""
        busy = late = 0.0
        ends = {name: last for name, (_, last) in lifetimes(self.graph).items()}
        first = {self.graph.position[r.pack[0].name]: r for r in self.remakes if r.drained}
        for at, remake in sorted(first.items()):
            busy = max(busy, self.clock[at] + late) + self.cost(remake.pack[0])
            enough = bisect_left(self.clock, busy - late) - 1
            way = Way(1, remake, remake.drained, alone=2 * ends[remake.value] + 1)
            there = self.graph.position[remake.pack[-1].name]
            best = self.furthest(way, range(there + 1, len(self.steps)), enough)
            self.drained[remake.pack[0].name] = remake.drained if best is None else self.steps[best].name
            if best is not None:
                self.hold(way, range(2 * there + 1, 2 * self.beyond(best, 1) + 2))
            late = max(late, busy - self.clock[there if best is None else best + 1])

    def fetch(self) -> None:
        """From the last read to the first: begin at the last moment from which the copy arrives in time, or at the
        first that there is room for."""
        placer = Placer(self.problem.graph, self.remakes)
        placer.schedule()
        places = [
            (self.graph.position[placer.copies[r.value, at]], at) for at, r in enumerate(self.remakes) if r.drained
        ]
        busy = float("inf")
        for place, index in sorted(places, reverse=True):
            remake = self.remakes[index]
            busy = min(busy, self.clock[place]) - self.cost(remake.unpack[0])
            enough = bisect_right(self.clock, busy) - 1
            way = Way(-1, remake, remake.fetched)
            best = self.furthest(way, range(place - 1, -1, -1), enough)
            self.fetched[index] = remake.fetched if best is None else self.steps[best].name
            if best is not None:
                self.hold(way, range(2 * self.beyond(best, -1) - 1, 2 * place))
            busy = max(busy, self.clock[place if best is None else best])

    def beyond(self, at: int, way: int) -> int:
        """The last of the steps that the plan has put behind the one at this place (way 1: packs), or the first of
        those before it (-1: copies): what is put there too may stand beyond them."""
        real, phase = self.problem.graph.position, self.steps[at].phase
        while (step := self.steps[at + way]).name not in real and step.phase == phase:
            at += way
        return at

    def takes(self, way: Way, moment: int) -> int:
        """Bytes that the copy adds there: its token, and the value from when on it is held for the copy alone."""
        token = rounded(TOKEN, self.problem.block)
        value = rounded(self.graph.storages[way.remake.value].nbytes, self.problem.block)
        return token + (value if moment >= way.alone else 0)

    def hold(self, way: Way, moments: range) -> None:
        """The copy takes its bytes there."""
        for moment in moments:
            self.free[moment] -= self.takes(way, moment)

    def has_room(self, way: Way, moments: Iterable[int]) -> bool:
        """Whether there is room for the copy."""
        return all(self.free[moment] >= self.takes(way, moment) for moment in moments)

    def furthest(self, way: Way, places: range, enough: int) -> int | None:
        """The first of these places that is past `enough`, else the last that there is room for up to; None if that is
        where the copy stands now."""
        step = self.problem.graph.steps[self.problem.graph.position[way.beside]]
        best = None
        for at in places:
            if self.steps[at].phase != step.phase or not self.has_room(way, (2 * at - way.direction, 2 * at)):
                break
            ends = 2 * self.beyond(at, way.direction) + way.direction
            if self.side[at] == (step.phase, program(way.beside)) and self.has_room(
                way, range(2 * at + way.direction, ends + way.direction, way.direction)
            ):
                best = at
                if (at - enough) * way.direction >= 0:
                    break
        return best
