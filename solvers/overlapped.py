"""Plans whose copies go on while the step computes: what moves, then when.

The two are decided one after the other. The planner chooses what moves with copies at what they take and at next to
nothing; `moments.timed` gives each choice's copies their moments and simulates what comes of it by `edit`; the cheapest
is taken. Where the step waits for its copies, the link is a row of the next program: no more seconds of copies than
there were, less those that were waited for. So a plan is never dearer than with copies that are awaited at once, nor
than with nothing but copies.

What is proven. A plan whose copies overlap holds, at each of the graph's steps, at least what it holds with the same
copies awaited at once, and takes at least the seconds of its other steps. So no plan is cheaper than the bound of the
problem whose copies cost a SHARE, less what that share of all copies comes to. What is not: that the moments are the
best ones; and the bound knows no link, so a step bound by one may be far above it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from memopt.edit import Remake
from memopt.overlap import moves, waits_of
from memopt.plans import Plan, Problem, Status, simulated
from memopt.solvers.moments import rank, timed
from memopt.solvers.planner import bounded, exact_of, solve

SHARE = 1e-3  # of a copy's seconds: enough that nothing is moved for nothing
TRIES = 4  # programs about what moves, the first without a row for the link
LINK = "link"  # a resource: seconds of copies
DUST = 1e-9  # of the step's seconds: sums taken in another order
NEAR = 0.01  # of the seconds: a plan so near its bound is called optimal, as by `solve`


def solve_overlapped(problem: Problem, *, time_limit: float = 20.0, quick: bool = False, bound: bool = True) -> Plan:
    """As `solve`, with copies that may go on while other steps run; see above for what the plan certifies."""
    plan = solve(problem, time_limit=time_limit, quick=quick, bound=bound)
    if plan.status in (Status.FITS, Status.INFEASIBLE) or not any(map(moves, problem.remakes)):
        return plan
    hidden = solve(hiding(problem), time_limit=time_limit, quick=quick, bound=bound)
    found, tries = [plan, timed(problem, plan.chosen)], 1 if quick else TRIES
    moved = replace(problem, remakes=tuple(filter(moves, problem.remakes)))
    exact = exact_of(problem.remakes)
    found += shorter(problem, moved, solve(hiding(moved), quick=True), tries)
    if exact == problem.remakes:
        found += shorter(problem, problem, hidden, tries)
    else:  # consent to lossy levers makes no plan dearer
        exactly = replace(problem, remakes=exact)
        found.append(timed(problem, remakes_of(problem, hidden.chosen)))
        found += shorter(problem, exactly, solve(hiding(exactly), quick=True), tries)
    best = min(found, key=lambda p: rank(problem, p))
    return certified(problem, replace(best, solver=plan.solver), hidden)


def shorter(problem: Problem, offered: Problem, first: Plan, tries: int) -> Iterator[Plan]:
    """Timed plans with ever fewer seconds of copies, until none is waited for. first: of these offers, without a row
    for the link."""
    plan = timed(problem, remakes_of(problem, first.chosen))
    yield plan
    for _ in range(tries - 1):
        waited = plan.seconds - simulated(hiding(problem, 0.0), plan.chosen, "").seconds
        under_way = any(remake.drained for remake in plan.chosen)
        if not under_way or waited <= DUST * problem.elapsed or plan.peak > problem.budget:
            return
        row = linked(offered, link_seconds(problem, plan.chosen) - waited)
        plan, last = timed(problem, remakes_of(problem, solve(hiding(row), quick=True).chosen)), plan
        if plan.chosen == last.chosen:
            return
        yield plan


def linked(problem: Problem, limit: float) -> Problem:
    """The problem with a row for the link: a value that moves takes seconds of it, of which there are so many."""
    price = copying(problem)
    offers = tuple(
        replace(r, takes=(*r.takes, (LINK, there_and_back(r, price)))) if moves(r) else r for r in problem.remakes
    )
    return replace(problem, remakes=offers, limits={**problem.limits, LINK: max(0.0, limit)})


def there_and_back(remake: Remake, price: Mapping[str, float]) -> float:
    """Seconds of its copy out and of one back, which is what a value takes of the link however often it comes back."""
    return price[remake.pack[0].name] + price[remake.unpack[0].name]


def link_seconds(problem: Problem, chosen: Sequence[Remake]) -> float:
    """Seconds that these remakes take of the link, as the row counts them."""
    price = copying(problem)
    return sum({r.pack[0].name: there_and_back(r, price) for r in chosen if moves(r)}.values())


def all_copies(problem: Problem) -> float:
    """Seconds of all copies that are offered: one out of each value, and one in for each remake."""
    price, offers = copying(problem), [remake for remake in problem.remakes if moves(remake)]
    out = {remake.pack[0].name for remake in offers}
    return sum(price[name] for name in (*sorted(out), *(remake.unpack[0].name for remake in offers)))


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


def copying(problem: Problem) -> dict[str, float]:
    """Seconds by name of the steps that copy values there and back."""
    steps = (step for remake in problem.remakes if moves(remake) for step in (*remake.pack, *remake.unpack))
    return {step.name: problem.seconds.get(step.name, 0.0) for step in steps}


def hiding(problem: Problem, share: float = SHARE) -> Problem:
    """The problem whose copies take a share of their seconds, as if the rest could always be hidden, and besides what
    their waits take by themselves."""
    cheap: dict[str, float] = {}
    for remake in filter(moves, problem.remakes):
        for step, wait in zip((*remake.pack, *remake.unpack), waits_of(remake), strict=True):
            cheap[step.name] = share * problem.seconds.get(step.name, 0.0) + problem.seconds.get(wait, 0.0)
    offers = tuple(
        replace(r, seconds=sum(cheap[s.name] for s in (*r.pack, *r.unpack))) if moves(r) else r for r in problem.remakes
    )
    return replace(problem, remakes=offers, seconds={**problem.seconds, **cheap})


def remakes_of(problem: Problem, chosen: Sequence[Remake]) -> tuple[Remake, ...]:
    """The same choice at the problem's own prices; spans may be a plan's own."""
    own = {offer.pack[0].name: offer for offer in problem.remakes if moves(offer)}
    offers = (own.get(r.pack[0].name) if moves(r) else None for r in chosen)
    return tuple(replace(r, seconds=o.seconds, takes=o.takes) if o else r for r, o in zip(chosen, offers, strict=True))
