"""The planner's front door: `solve` picks a method, walks the canonical frontier, certifies the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

from memopt.plans import Plan, Problem, Status, simulated
from memopt.solvers.engine import Engine, path
from memopt.solvers.space import Space, State
from memopt.timeline import peak

Progress = Callable[[str, float], None]
DEPTH = 9  # halvings of the range between the floor and the unconstrained peak
NARROW = 0.001  # of that range: no halving below


def fits(problem: Problem) -> Plan | None:
    """The empty plan when the step holds the budget as it is."""
    top = peak(problem.graph, problem.block)
    return Plan((), top, 0.0, 0.0, Status.FITS, floor=top, solver="none") if top <= problem.budget else None


def frontier(engine: Engine, budget: int) -> tuple[State, State]:
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
    for _ in range(DEPTH):
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
    """The cheapest plan found within the budget; see Plan for what it certifies."""
    if (plan := fits(problem)) is not None:
        return plan
    started = perf_counter()
    space = Space(problem)
    engine = Engine(space)
    state, least = frontier(engine, problem.budget)
    plan = simulated(problem, space.remakes(state.parts), "lp")
    bound = engine.bound(problem.budget)
    if progress is not None:
        progress("planned", perf_counter() - started)
    return replace(plan, floor=min(least.peak, plan.peak), lower_bound=min(bound or 0.0, plan.seconds))
