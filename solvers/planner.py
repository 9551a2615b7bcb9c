"""The planner's front door: `solve` picks a method, walks the canonical frontier, certifies the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

from memopt.plans import Plan, Problem, Status, simulated
from memopt.solvers.brute import brute
from memopt.solvers.engine import TINY, Engine, path
from memopt.solvers.greedy import greedy
from memopt.solvers.milp import milp, refine
from memopt.solvers.space import Space, State
from memopt.timeline import peak

Progress = Callable[[str, float], None]
DEPTH = 9  # halvings of the range between the floor and the unconstrained peak
ROUNDS = 8  # solutions in integers that may sharpen the bound of a small problem
NARROW = 0.001  # of that range: no halving below


def fits(problem: Problem) -> Plan | None:
    """The empty plan when the step holds the budget as it is."""
    top = peak(problem.graph, problem.block)
    return Plan((), top, 0.0, 0.0, Status.FITS, floor=top, solver="none") if top <= problem.budget else None


def frontier(engine: Engine, budget: int, tell: Callable[[str], None]) -> tuple[State, State]:
    """(cheapest state found within the budget or the floor, the floor).

    The range of peaks is halved at fixed places and a state found for each half, so which states exist does not
    depend on the budget; a state is taken only if it lies between its neighbours in bytes and in seconds. Two budgets
    therefore see two brackets in order, or the same one: as the budget falls the peak never rises, nor do seconds fall.
    """
    space = engine.space
    high, low = space.state(space.none()), engine.lowest()
    if low.peak > budget:
        return low, low
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
    return between(engine, low, high, budget), least


def between(engine: Engine, low: State, high: State, budget: int) -> State:
    """The cheapest state within the budget on the path between two neighbours of the frontier."""
    best = low
    for state in path(engine, low, high):
        inside = low.peak <= state.peak < high.peak and low.seconds >= state.seconds > high.seconds
        if inside and state.peak <= budget and (state.seconds, state.peak) < (best.seconds, best.peak):
            best = state
    return best


def solve(problem: Problem, *, method: str = "auto", gap: float = 0.01, time_limit: float = 20.0,
          progress: Progress | None = None) -> Plan:  # fmt: skip
    """The cheapest plan found within the budget, or the lowest there is; see Plan for what it certifies.

    method: "auto" (the frontier; greedy where offers overlap), or the name of a solver. The choice depends on the
    problem alone; gap (of the seconds) and time_limit (seconds) only decide how long a lower bound is sharpened.
    progress: called with what is done and the seconds so far. Raises ValueError for an unknown method.
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
    return planned(problem, space, gap, time_limit, progress) if space.separable else greedy(problem)


def planned(problem: Problem, space: Space, gap: float, time_limit: float, progress: Progress | None) -> Plan:
    started = perf_counter()
    tell = progress or (lambda what, seconds: None)
    engine = Engine(space)
    state, least = frontier(engine, problem.budget, lambda what: tell(what, perf_counter() - started))
    plan = simulated(problem, space.remakes(state.parts), "frontier")
    plan = replace(plan, floor=min(least.peak, plan.peak))
    if plan.status is Status.INFEASIBLE:
        return plan
    plan = replace(plan, lower_bound=min(engine.bound(problem.budget) or 0.0, plan.seconds))
    tell("bounded", perf_counter() - started)
    if plan.gap > gap and space.steps <= TINY:
        until = started + time_limit
        _, bound, _ = refine(problem, space, plan, gap, until, ROUNDS, sorted(engine.model.rows))
        plan = replace(plan, lower_bound=min(max(bound, plan.lower_bound), plan.seconds))
    return replace(plan, status=Status.OPTIMAL) if plan.gap <= gap else plan


METHODS: dict[str, Callable[[Problem], Plan]] = {"auto": solve, "brute": brute, "greedy": greedy, "milp": milp}
