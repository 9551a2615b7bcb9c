"""When the copies of a plan's moves begin and are waited for: as little waiting as the bytes left over can hide."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from memopt.edit import DISK, HOST, Placer, Remake, edit, taken
from memopt.graph import Step, StepGraph
from memopt.overlap import moves, overlapped
from memopt.plans import Plan, Problem, original, simulated
from memopt.timeline import lifetimes, live_after, rounded, timeline
from memopt.tokens import TOKEN


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
    """The remakes without moves that nobody reads, of what others move too. All moves of a value, or of one part, share
    one copy out, so one without moments of its own would leave the others without a beginning."""
    placer = Placer(graph, chosen)
    placer.schedule()
    read = {chosen[at].pack[0].name for _, at in placer.copies if moves(chosen[at])}
    spare = (moves(r) and r.pack[0].name in read and (r.value, at) not in placer.copies for at, r in enumerate(chosen))
    return tuple(r for r, without in zip(chosen, spare, strict=True) if not without)


def just_in_time(graph: StepGraph, chosen: Sequence[Remake]) -> tuple[Remake, ...]:
    """The remakes with each move as it is awaited at once: drained behind the maker, fetched by the first reader."""
    placer = Placer(graph, chosen)
    before = placer.schedule().before
    reader = {copy.name: graph.steps[at].name for at, copied in before.items() for copy in copied}
    out = []
    for index, remake in enumerate(chosen):
        first = reader.get(placer.copies.get((remake.value, index), ""))
        maker = graph.steps[graph.uses[remake.value][0]].name
        out.append(overlapped(remake, maker, first) if first and moves(remake) else remake)
    return tuple(out)


class Moments:
    """Moves drains later and fetches earlier, while the bytes of the step as it stands leave room.

    graph: the step with all copies awaited at once. room: bytes left under the budget while each of its steps runs;
    gap: once it has run, where a copy out is waited for: a fused step's results are in no other's place any more.
    clock: seconds before each step, copies taking none. side: phase and program of the steps that a copy may be put
    behind or before. drained: the name of a copy out -> step; fetched: remake -> step.
    """

    def __init__(self, problem: Problem, remakes: Sequence[Remake]) -> None:
        self.problem, self.remakes = problem, remakes
        self.graph = edit(problem.graph, remakes)
        self.steps = self.graph.steps
        self.room = [problem.budget - held for held in timeline(self.graph, problem.block)]
        self.gap = [problem.budget - held for held in live_after(self.graph, problem.block)]
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

    def size(self, remake: Remake) -> int:
        """Bytes of the value, and of its token: what it takes more, at most, while it is on its way."""
        return sum(rounded(each, self.problem.block) for each in (self.graph.storages[remake.value].nbytes, TOKEN))

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
        free = late = 0.0
        ends = {name: last for name, (_, last) in lifetimes(self.graph).items()}
        first = {self.graph.position[r.pack[0].name]: r for r in self.remakes if r.drained}
        for at, remake in sorted(first.items()):
            free = max(free, self.clock[at] + late) + self.cost(remake.pack[0])
            held = ends[remake.value] + 1  # from here on, and just before, it is held for the copy alone
            enough = bisect_left(self.clock, free - late) - 1
            best = self.furthest(range(at + 2, len(self.steps)), remake, remake.drained, held, enough)
            self.drained[remake.pack[0].name] = remake.drained if best is None else self.steps[best].name
            self.hold(range(held, at if best is None else self.beyond(best, 1) + 1), remake)
            late = max(late, free - self.clock[at if best is None else best + 1])

    def fetch(self) -> None:
        """From the last read to the first: begin at the last moment from which the copy arrives in time, or at the
        first that there is room for."""
        placer = Placer(self.problem.graph, self.remakes)
        placer.schedule()
        places = [
            (self.graph.position[placer.copies[r.value, at]], at) for at, r in enumerate(self.remakes) if r.drained
        ]
        free = float("inf")
        for place, index in sorted(places, reverse=True):
            remake = self.remakes[index]
            free = min(free, self.clock[place]) - self.cost(remake.unpack[0])
            enough = bisect_right(self.clock, free) - 1
            best = self.furthest(range(place - 1, -1, -1), remake, remake.fetched, 0, enough)
            self.fetched[index] = remake.fetched if best is None else self.steps[best].name
            begins = place if best is None else best
            self.hold(range(self.beyond(begins, -1), place), remake)
            free = max(free, self.clock[begins])

    def beyond(self, at: int, way: int) -> int:
        """The last of the steps that the plan has put behind the one at this place (way 1: packs), or the first of
        those before it (-1: copies): what is put there too may stand beyond them."""
        real, phase = self.problem.graph.position, self.steps[at].phase
        while (step := self.steps[at + way]).name not in real and step.phase == phase:
            at += way
        return at

    def hold(self, places: range, remake: Remake) -> None:
        """The value takes its bytes there, and before and after."""
        for at in places:
            self.room[at] -= self.size(remake)
        for at in (places.start - 1, *places) if places else ():
            self.gap[at] -= self.size(remake)

    def has_room(self, at: int, way: int, remake: Remake, held: int) -> bool:
        """Whether the value can also be held beyond the step at this place, where what begins or ends there may be."""
        end, size = self.beyond(at, way), self.size(remake)
        beside, between = range(end, at), range(0)
        if way > 0:
            beside, between = range(max(at + 1, held), end + 1), range(max(at, held - 1), end + 1)
        return all(self.room[place] >= size for place in beside) and all(self.gap[place] >= size for place in between)

    def furthest(self, places: range, remake: Remake, beside: str, held: int, enough: int) -> int | None:
        """The first of these places that is past `enough`, else the last that there is room for up to; None if that is
        where the copy stands now, beside this step. Below `held` the value of a copy out takes its bytes anyway."""
        step = self.problem.graph.steps[self.problem.graph.position[beside]]
        best = None
        for at in places:
            full = places.step < 0 or at >= held
            if self.steps[at].phase != step.phase or (full and self.room[at] < self.size(remake)):
                break
            stands = self.side[at] == (step.phase, program(beside))
            if stands and self.has_room(at, places.step, remake, held):
                best = at
                if (at - enough) * places.step >= 0:
                    break
        return best


def program(step: str) -> str:
    """Which of the step's programs it belongs to, by its prefix."""
    return step.partition("/")[0] if "/" in step else ""
