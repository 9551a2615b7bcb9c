"""When the copies of a plan's moves begin and are waited for: as little waiting as the bytes left over can hide.

Which values move and when are decided one after the other. `solve_overlapped` has the planner choose with copies at
what they take, at next to nothing, and so among copies alone; `timed` then gives each plan's copies their moments,
simulates what comes of it by `edit`, and the cheapest is taken. So a plan is never dearer than with copies that are
awaited at once, nor than with nothing but copies.

What is proven. A plan whose copies overlap holds, at each of the graph's steps, at least what it holds with the same
copies awaited at once, and takes at least the seconds of its other steps. So no plan is cheaper than the bound of the
problem whose copies cost a SHARE, less what that share of all copies comes to. What is not: that the moments are the
best ones; and the bound knows no link, so a step bound by one may be far above it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from memopt.edit import DISK, HOST, Placer, Remake, edit, taken
from memopt.graph import Step, StepGraph
from memopt.overlap import moves, overlapped
from memopt.plans import Plan, Problem, Status, original, simulated
from memopt.solvers.planner import bounded, solve
from memopt.timeline import lifetimes, rounded, timeline

SHARE = 1e-3  # of a copy's seconds: enough that nothing is moved for nothing
NEAR = 0.01  # of the seconds: a plan so near its bound is called optimal, as by `solve`


def solve_overlapped(problem: Problem, *, time_limit: float = 20.0, quick: bool = False, bound: bool = True) -> Plan:
    """As `solve`, with copies that may go on while other steps run; see above for what the plan certifies."""
    plan = solve(problem, time_limit=time_limit, quick=quick, bound=bound)
    if plan.status in (Status.FITS, Status.INFEASIBLE) or not any(map(moves, problem.remakes)):
        return plan
    hidden = solve(hiding(problem), time_limit=time_limit, quick=quick, bound=bound)
    moved = hiding(replace(problem, remakes=tuple(filter(moves, problem.remakes))))
    chosen = [remakes_of(problem, p.chosen) for p in (hidden, solve(moved, quick=True))]
    best = min((*(timed(problem, c) for c in (*chosen, plan.chosen)), plan), key=lambda p: rank(problem, p))
    return certified(problem, replace(best, solver=plan.solver), hidden)


def certified(problem: Problem, plan: Plan, hidden: Plan) -> Plan:
    """The plan with the lower bound that the plan of the `hiding` problem gives it."""
    bound = min(max(0.0, hidden.lower_bound - SHARE * all_copies(problem)), plan.seconds)
    plan = replace(plan, lower_bound=bound)
    return replace(plan, status=Status.OPTIMAL if plan.gap <= NEAR else Status.FEASIBLE)


def bounded_overlapped(problem: Problem, plan: Plan, *, time_limit: float = 20.0) -> Plan:
    """A plan that `solve_overlapped` found with bound=False for this problem, with its lower bound."""
    if plan.status in (Status.FITS, Status.INFEASIBLE) or not any(map(moves, problem.remakes)):
        return bounded(problem, plan, time_limit=time_limit)
    hidden = bounded(hiding(problem), simulated(hiding(problem), plan.chosen, plan.solver), time_limit=time_limit)
    return certified(problem, plan, hidden)


def rank(problem: Problem, plan: Plan) -> tuple[bool, float, float]:
    """The plans within the budget come first, then the cheaper, then those that move less."""
    moved = sum(amount for resource, amount in taken(plan.chosen).items() if resource in (DISK, HOST))
    return plan.peak > problem.budget, plan.seconds, moved


def copying(problem: Problem) -> dict[str, float]:
    """Seconds by name of the steps that copy values there and back."""
    steps = (step for remake in problem.remakes if moves(remake) for step in (*remake.pack, *remake.unpack))
    return {step.name: problem.seconds.get(step.name, 0.0) for step in steps}


def all_copies(problem: Problem) -> float:
    """Seconds of all copies that are offered: one out of each value, and one in for each remake."""
    known, out = problem.seconds, {s.name for r in problem.remakes if moves(r) for s in r.pack}
    back = (step.name for remake in problem.remakes if moves(remake) for step in remake.unpack)
    return sum(known.get(name, 0.0) for name in (*sorted(out), *back))


def hiding(problem: Problem) -> Problem:
    """The problem whose copies take a SHARE of their seconds, as if the rest could always be hidden."""
    cheap = {name: SHARE * seconds for name, seconds in copying(problem).items()}
    offers = tuple(replace(r, seconds=SHARE * r.seconds) if moves(r) else r for r in problem.remakes)
    return replace(problem, remakes=offers, seconds={**problem.seconds, **cheap})


def remakes_of(problem: Problem, chosen: Sequence[Remake]) -> tuple[Remake, ...]:
    """The same choice at the problem's own prices; spans may be a plan's own."""
    price = {(offer.trade, offer.value): offer.seconds for offer in problem.remakes if moves(offer)}
    return tuple(replace(r, seconds=price[r.trade, r.value]) if moves(r) else r for r in chosen)


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
    """The remakes without moves that nobody reads, of values that others move too. All moves of a value share one copy
    out, so one without moments of its own would leave the others without a beginning."""
    placer = Placer(graph, chosen)
    placer.schedule()
    read = {value for value, at in placer.copies if moves(chosen[at])}
    spare = (moves(r) and r.value in read and (r.value, at) not in placer.copies for at, r in enumerate(chosen))
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

    graph: the step with all copies awaited at once. room: bytes left under the budget while each of its steps runs.
    clock: seconds before each step, copies taking none. side: phase and program of the steps that a copy may be put
    behind or before. drained: value -> step; fetched: remake -> step.
    """

    def __init__(self, problem: Problem, remakes: Sequence[Remake]) -> None:
        self.problem, self.remakes = problem, remakes
        self.graph = edit(problem.graph, remakes)
        self.steps = self.graph.steps
        self.room = [problem.budget - held for held in timeline(self.graph, problem.block)]
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
        """Bytes of the value, and of the token that a wait makes."""
        nbytes = (self.graph.storages[remake.value].nbytes, remake.made[-1][1].nbytes)
        return sum(rounded(each, self.problem.block) for each in nbytes)

    def chosen(self) -> tuple[Remake, ...]:
        """The remakes with their moments."""
        self.drain()
        self.fetch()
        return tuple(
            overlapped(r, self.drained[r.value], self.fetched[at]) if r.drained else r
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
            held = ends[remake.value] + 1  # from here on it is held for the copy alone
            enough = bisect_left(self.clock, free - late) - 1
            best = self.furthest(range(at + 2, len(self.steps)), remake, remake.drained, held, enough)
            self.drained[remake.value] = remake.drained if best is None else self.steps[best].name
            self.hold(range(held, at if best is None else best + 1), remake)
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
            self.hold(range(begins, place), remake)
            free = max(free, self.clock[begins])

    def hold(self, places: range, remake: Remake) -> None:
        """The value takes its bytes there."""
        for at in places:
            self.room[at] -= self.size(remake)

    def furthest(self, places: range, remake: Remake, beside: str, held: int, enough: int) -> int | None:
        """The first of these places that is past `enough`, else the last that there is room for up to; None if that is
        where the copy stands now, beside this step. Below `held` the value takes its bytes anyway."""
        step = self.problem.graph.steps[self.problem.graph.position[beside]]
        best = None
        for at in places:
            full = places.step < 0 or at >= held
            if self.steps[at].phase != step.phase or (full and self.room[at] < self.size(remake)):
                break
            if self.side[at] == (step.phase, program(beside)):
                best = at
                if (at - enough) * places.step >= 0:
                    break
        return best


def program(step: str) -> str:
    """Which of the step's programs it belongs to, by its prefix."""
    return step.partition("/")[0] if "/" in step else ""
