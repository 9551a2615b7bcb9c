"""The planner's front door: `solve` picks a method, walks the canonical frontier, certifies the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter

from memopt.edit import GRADIENT, Remake
from memopt.plans import Plan, Problem, Status, simulated
from memopt.solvers.brute import brute
from memopt.solvers.chain import Links, chain, levels, links_of
from memopt.solvers.engine import Engine, path
from memopt.solvers.greedy import greedy
from memopt.solvers.ladder import LARGE, Ladder
from memopt.solvers.milp import milp
from memopt.solvers.model import Model
from memopt.solvers.passing import in_passing
from memopt.solvers.space import Space, State
from memopt.timeline import least_peak, peak

Progress = Callable[[str, float], None]
DEPTH = 9  # halvings of the range between the floor and the unconstrained peak
TINY = 640  # offers up to which the bound is sharpened in integers
WHOLE = 1.0  # seconds for one such search; the plan does not depend on it
ROUNDS = 4  # solutions in integers that may sharpen the bound of a small problem
CHEAP = 0.8  # of remaking everything inside blocks: cheaper plans cannot be undercut by the chain's
HEAVY = 0.2  # of the peak
WITHIN = 1e-6  # of the seconds: a solver's tolerance
NARROW = 0.001  # of that range: no halving below


def fits(problem: Problem) -> Plan | None:
    """The empty plan when the step holds the budget as it is."""
    top = peak(problem.graph, problem.block)
    return Plan((), top, 0.0, 0.0, Status.FITS, "none") if top <= problem.budget else None


def frontier(engine: Engine, budget: int, tell: Callable[[str], None]) -> State:
    """The cheapest state found within the budget, or the lowest.

    The range of peaks is halved at fixed places and a state found for each half, so which states exist does not
    depend on the budget; a state is taken only if it lies between its neighbours in bytes and in seconds. Two budgets
    therefore see two brackets in order, or the same one: as the budget falls the peak never rises, nor do seconds fall.
    """
    space = engine.space
    high, low = space.state(space.none()), engine.lowest()
    if low.peak > budget:
        return low
    least, top, bottom = low, high.peak, low.peak
    for depth in range(DEPTH):
        tell(f"frontier {depth + 1} of {DEPTH}")
        target = (top + bottom) // 2
        if top - bottom <= NARROW * (space.state(space.none()).peak - least.peak):
            break
        state = engine.reach(target, high)
        inside = state is not None and low.peak < state.peak < high.peak and low.seconds > state.seconds > high.seconds
        if state is not None and inside and state.peak <= target:
            if state.peak <= budget:
                low = state
            else:
                high = state
        if budget >= target:
            bottom = target
        else:
            top = target
    return between(engine, low, high, budget)


def between(engine: Engine, low: State, high: State, budget: int) -> State:
    """The cheapest state within the budget on the path between two neighbours of the frontier."""
    best = low
    for state in path(engine, low, high):
        inside = low.peak <= state.peak < high.peak and low.seconds >= state.seconds > high.seconds
        if inside and state.peak <= budget and (state.seconds, state.peak) < (best.seconds, best.peak):
            best = state
    return best


def solve(problem: Problem, *, method: str = "auto", gap: float = 0.01, time_limit: float = 20.0,
          progress: Progress | None = None, quick: bool = False, bound: bool = True) -> Plan:  # fmt: skip
    """The cheapest plan found within the budget, or the lowest there is; see Plan for what it certifies.

    method: "auto" (the frontier; greedy where offers overlap), or the name of a solver. The choice depends on the
    problem alone; gap (of the seconds) and time_limit (seconds) only decide how long a lower bound is sharpened.
    progress: called with what is done and the seconds so far. quick: seeks no lower bound, and no lowest plan where
    none can be within the budget. bound: False leaves the lower bound to `bounded`. Raises ValueError for an unknown
    method.
    """
    if method not in METHODS:
        raise ValueError(f"no solver is called {method!r}; there are {', '.join(METHODS)}")
    if (plan := fits(problem)) is not None:
        return plan
    if method != "auto":
        return METHODS[method](problem)
    if not problem.remakes:
        return simulated(problem, (), "none")
    space = Space(problem)
    if not space.separable:
        return greedy(problem)
    plan = planned(problem, space, gap, time_limit, progress, quick, bound)
    for alone in apart(problem) if space.packed else ():
        other = solve(alone, gap=gap, time_limit=time_limit, progress=progress, quick=quick, bound=bound)
        plan = never_worse(problem, plan, other)
    return plan


def apart(problem: Problem) -> Iterator[Problem]:
    """The same problem with what is exact alone where some is not, so that consent never makes a plan worse, else with
    what runs steps again alone; and with each trade alone whose values are HEAVY. Whatever the budget: what is refused
    has one floor."""
    large, offers = len(problem.graph.steps) > LARGE, problem.remakes
    exact = exact_of(offers)
    mixed = bool(exact) and len(exact) < len(offers) and not large
    again = tuple(remake for remake in offers if remake.repeats)
    yield replace(problem, remakes=exact if mixed else again)  # of the exact ones, these are tried in turn
    tried = {remake.trade for remake in exact} if mixed else set()
    trades = dict.fromkeys(remake.trade for remake in offers if not remake.repeats and remake.trade not in tried)
    weight = {trade: heavy(problem, trade) for trade in trades}
    if (mixed or again or len(weight) > 1) and not large:
        for trade in (trade for trade, enough in weight.items() if enough):
            yield replace(problem, remakes=tuple(r for r in problem.remakes if r.trade == trade))


def exact_of(offers: tuple[Remake, ...]) -> tuple[Remake, ...]:
    """Those that take nothing of the gradient."""
    return tuple(r for r in offers if not any(resource == GRADIENT for resource, _ in r.takes))


def heavy(problem: Problem, trade: str) -> bool:
    """Whether a trade's values are so large a share of the peak that it may be the best alone."""
    values = {remake.value for remake in problem.remakes if remake.trade == trade}
    size = problem.graph.storages
    return sum(size[value].nbytes for value in values) >= HEAVY * peak(problem.graph, problem.block)


def never_worse(problem: Problem, plan: Plan, alone: Plan) -> Plan:
    """The cheaper of two within the budget, else the lower: what is found among more offers may be the worse of both.

    The bound is that of all offers; a plan that undercuts it is none of them, as in `certified`."""
    best = min(plan, alone, key=lambda p: (max(p.peak - problem.budget, 0), p.seconds, p.peak))
    if best is plan or best.status is Status.INFEASIBLE:
        return best
    bound = 0.0 if best.seconds < plan.lower_bound * (1 - 1e-9) else min(plan.lower_bound, best.seconds)
    return replace(best, lower_bound=bound, status=Status.FEASIBLE)


def bounded(problem: Problem, plan: Plan, *, gap: float = 0.01, time_limit: float = 20.0) -> Plan:
    """A plan that `solve` found with bound=False for this problem, with its lower bound."""
    if plan.status in (Status.FITS, Status.INFEASIBLE) or not problem.remakes:
        return plan
    space = Space(problem)
    if not space.separable:
        return plan
    engine, until = Engine(space), perf_counter() + time_limit
    frontier(engine, problem.budget, lambda _: None)  # its rows sharpen the bound
    return certified(problem, engine, plan, gap, until)


def planned(
    problem: Problem,
    space: Space,
    gap: float,
    time_limit: float,
    progress: Progress | None,
    quick: bool = False,
    bound: bool = True,
) -> Plan:
    """The frontier, then the chain below it, then the bound."""
    started = perf_counter()

    def tell(what: str) -> None:
        if progress is not None:
            progress(what, perf_counter() - started)

    engine = Engine(space)
    state = frontier(engine, problem.budget, tell)
    plan = simulated(problem, space.remakes(state.parts), "frontier")
    if quick and plan.status is Status.INFEASIBLE and beyond(problem):
        return plan
    plan = deeper(problem, space, plan)
    tell("segments")
    if quick or not bound or plan.status is Status.INFEASIBLE:
        return plan
    plan = certified(problem, engine, plan, gap, started + time_limit)
    tell("bounded")
    return plan


def beyond(problem: Problem) -> bool:
    """Whether no choice of the offers can hold the budget: what one step makes and what is not offered exceed it."""
    movable = frozenset(remake.value for remake in problem.remakes)
    return least_peak(problem.graph, movable, problem.block) > problem.budget


def deeper(problem: Problem, space: Space, plan: Plan) -> Plan:
    """The plan, or one of the chain's or of the ladder where that is cheaper within the budget, or lower where nothing
    holds it. Neither's plans depend on the budget, so the answer stays monotone; and every budget that is refused gets
    the same answer, the lowest of all, so that what is below its peak is refused too."""
    links = links_of(problem, space)
    chains = () if links is None else chained(problem, links, plan)
    found = (plan, *chains)
    if len(problem.graph.steps) <= LARGE:
        found = (*found, *Ladder(space, chains).down(problem.budget))
    best = min(found, key=lambda p: (max(p.peak - problem.budget, 0), p.seconds, p.peak))
    return plan if best is plan else simulated(problem, best.chosen, best.solver)  # by `edit` itself, whoever found it


def chained(problem: Problem, links: Links, plan: Plan) -> tuple[Plan, ...]:
    """The chain's levels and those that keep in passing.

    All of them make again what lies inside every block, but for the last block of some: a step too large for the ladder
    goes without them beside a plan far cheaper than that.
    """
    space = links.space
    inside = [space.work(k, mine).seconds for k, mine in zip(links.regions, links.inside, strict=True)]
    cheap = plan.status is not Status.INFEASIBLE and plan.seconds < CHEAP * sum(inside[:-1])
    if cheap and len(problem.graph.steps) > LARGE:
        return ()
    return (*levels(problem, links, float(space.state(space.none()).peak)), *in_passing(problem, links))


def certified(problem: Problem, engine: Engine, plan: Plan, gap: float, until: float) -> Plan:
    """The plan with its lower bound: the relaxation's, for small problems sharpened in integers.

    It bounds the subsets of the offers. A plan with gaps that undercuts it is none of them, and has none (0.0)."""
    bound = engine.bound(problem.budget)
    if bound is None or plan.seconds < bound * (1 - WITHIN):
        return plan
    plan = replace(plan, lower_bound=min(bound, plan.seconds))
    if plan.gap > gap and engine.offers <= TINY:
        bound = sharpened(problem, engine, (1 - gap) * plan.seconds, until)
        if plan.seconds < bound * (1 - WITHIN):
            return replace(plan, lower_bound=0.0)
        plan = replace(plan, lower_bound=min(max(bound, plan.lower_bound), plan.seconds))
    return replace(plan, status=Status.OPTIMAL) if plan.gap <= gap else plan


def sharpened(problem: Problem, engine: Engine, enough: float, until: float) -> float:
    """A lower bound on seconds from a few bounded searches in integers; ends at `enough` seconds, or at `until`.

    A choice is cut off only when the edited graph shows that it breaks the budget, so every bound holds.
    """
    space, model, bound = engine.space, Model(engine.space), 0.0
    for half in sorted(engine.model.rows):
        model.add_row(half)
    for _ in range(ROUNDS):
        values = model.solve_whole(problem.budget, WHOLE)
        bound = max(bound, model.dual_bound())
        if values is None or bound >= enough or perf_counter() > until:
            break
        parts = model.rounded(values)
        if simulated(problem, space.remakes(parts), "bound").peak <= problem.budget:
            break
        at = space.state(parts).at
        if at not in model.rows:
            model.add_row(at)
        elif problem.links:  # other moments of its copies may hold fewer bytes
            break
        else:
            model.exclude(parts)
    return bound


METHODS: dict[str, Callable[[Problem], Plan]] = {
    "auto": solve, "brute": brute, "chain": chain, "greedy": greedy, "milp": milp,
}  # fmt: skip
