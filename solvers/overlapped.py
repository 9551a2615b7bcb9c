"""Plans whose copies go on while the step computes: what moves, then when.

The two are decided one after the other. The planner chooses what moves with copies at what they take, at next to
nothing, and with a row for the link: no more seconds of copies than the relaxation that knows both links makes, then
fewer as long as the step waits for some. `moments.timed` gives each choice's copies their moments and simulates what
comes of it by `edit`; the cheapest is taken. So a plan is never dearer than with copies that are awaited at once.

What is proven. A plan whose copies overlap holds, at each of the graph's steps, at least what it holds with the same
copies awaited at once; of a part what stays may be copied later, which the rows allow. Its forward lasts at least as
long as its other steps, and as long as all copies out, which end there; so does the rest with the copies in. The bound
is that of a program with these rows. What is not: that the moments are the best ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from memopt.edit import Remake
from memopt.overlap import moves, waits_of
from memopt.plans import Plan, Problem, Status, simulated
from memopt.solvers.engine import Engine
from memopt.solvers.moments import rank, timed
from memopt.solvers.planner import bounded, exact_of, solve
from memopt.solvers.space import Space

SHARE = 1e-3  # of a copy's seconds: enough that nothing is moved for nothing
TRIES = 6  # programs with a row for the link, of one set of offers
LINK = "link"  # a resource: seconds of copies
DUST = 1e-9  # of the step's seconds: sums taken in another order


def solve_overlapped(problem: Problem, *, time_limit: float = 20.0, quick: bool = False, bound: bool = True) -> Plan:
    """As `solve`, with copies that may go on while other steps run; see above for what the plan certifies."""
    if not any(map(moves, problem.remakes)):
        return solve(problem, time_limit=time_limit, quick=quick, bound=bound)
    plan = solve(problem, time_limit=time_limit, quick=quick, bound=False)
    if plan.status in (Status.FITS, Status.INFEASIBLE):
        return plan
    hidden = solve(hiding(problem), time_limit=time_limit, quick=quick, bound=False)
    found = [plan, timed(problem, plan.chosen), timed(problem, remakes_of(problem, hidden.chosen))]
    moved = tuple(filter(moves, problem.remakes))
    for offers in dict.fromkeys((moved, exact_of(problem.remakes))):  # consent to lossy levers makes no plan dearer
        found += balanced(problem, replace(problem, remakes=offers), 1 if quick else TRIES)
    best = replace(min(found, key=lambda p: rank(problem, p)), solver=plan.solver)
    return best if quick or not bound else bounded_overlapped(problem, best, time_limit=time_limit)


def balanced(problem: Problem, offered: Problem, tries: int) -> Iterator[Plan]:
    """Timed plans of these offers with ever other seconds of copies. The first has as many as are worth it by the
    relaxation that knows the links; the next ones less those waited for, until there are none; then some beside the
    cheapest."""
    limit, tried, waiting = worthwhile(offered), dict[float, float](), True  # seconds of copies -> seconds added
    for _ in range(tries):
        row = offered if limit is None else linked(offered, limit)
        plan = timed(problem, remakes_of(problem, solve(hiding(row), quick=True).chosen))
        yield plan
        copied = link_seconds(problem, plan.chosen) if any(remake.drained for remake in plan.chosen) else 0.0
        if plan.peak > problem.budget or copied in tried:
            return
        tried[copied] = plan.seconds
        waited = plan.seconds - simulated(hiding(problem, 0.0), plan.chosen, "").seconds
        waiting = waiting and copied > 0.0 and waited > DUST * problem.elapsed
        if not waiting and len(tried) == 1:
            return
        limit = copied - waited if waiting else beside_cheapest(tried)


def beside_cheapest(tried: Mapping[float, float]) -> float:
    """Halfway from the cheapest to the farther one of those beside it."""
    order = sorted(tried)
    at = order.index(min(order, key=lambda copied: tried[copied]))
    near = order[max(at - 1, 0) : at + 2]
    return (order[at] + max(near, key=lambda copied: abs(copied - order[at]))) / 2


def worthwhile(problem: Problem) -> float | None:
    """Seconds of copies in the relaxation of the problem that `beside` makes; None where it has no solution."""
    space = Space(beside(problem))
    if not space.separable:
        return None
    engine = Engine(space)
    if engine.bound(problem.budget) is None or (values := engine.model.solve(problem.budget)) is None:
        return None
    return engine.model.copied(values)


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


def bounded_overlapped(problem: Problem, plan: Plan, *, time_limit: float = 20.0) -> Plan:
    """A plan that `solve_overlapped` found with bound=False for this problem, with its lower bound."""
    if not any(map(moves, problem.remakes)):
        return bounded(problem, plan, time_limit=time_limit)
    return bounded(beside(problem), plan, time_limit=time_limit)


def beside(problem: Problem) -> Problem:
    """The problem whose copies take their links' seconds alone; nothing it can hold takes fewer than its relaxation."""
    return replace(hiding(problem, 0.0), links=copying(problem))


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
