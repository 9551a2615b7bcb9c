"""The model in integers, made exact by cuts: what simulation refutes is cut off until the bound meets the best plan."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import highspy
import numpy as np

from memopt.plans import Plan, Problem, Status, simulated
from memopt.solvers.engine import Engine
from memopt.solvers.model import Model
from memopt.solvers.space import Parts, Space

SLACK = 1e-6  # of the seconds: two floats this near are equal


def milp(problem: Problem, *, gap: float = 0.0, time_limit: float = 20.0) -> Plan:
    """Least added seconds over all subsets of the offers: OPTIMAL when proven within `gap`, else FEASIBLE.

    Each answer of the relaxation is simulated by `edit`. Where the simulation needs more bytes or seconds than the
    model said, a missing memory row is added, else a cut that excludes this choice and all that simulate alike.
    Bounds only rise, so the loop ends; time_limit (seconds) ends it sooner with the best plan known.
    Offers must lie in disjoint regions (`Space.separable`), else ValueError.
    """
    space = Space(problem)
    if not space.separable:
        raise ValueError("milp needs offers of disjoint spans, one a value; greedy takes any")
    start = Engine(space)
    lowest = start.lowest()
    near = start.reach(problem.budget, space.state(space.none())) or lowest
    low, first = (simulated(problem, space.remakes(state.parts), "milp") for state in (lowest, near))
    best = cheaper(low, first, problem.budget)
    plan, bound, proven = refine(problem, space, best, gap, perf_counter() + time_limit)
    if plan.peak > problem.budget:
        return replace(plan, status=Status.INFEASIBLE)
    status = Status.FITS if not plan.chosen else Status.OPTIMAL if proven else Status.FEASIBLE
    return replace(plan, lower_bound=min(bound, plan.seconds), status=status)


def refine(problem: Problem, space: Space, best: Plan, gap: float, until: float) -> tuple[Plan, float, bool]:
    """(best plan, lower bound on seconds, proven within the gap)."""
    model = Model(space, integer=True)
    model.highs.setOptionValue("mip_rel_gap", min(gap, 1e-6))
    bound = 0.0
    while perf_counter() < until:
        model.highs.setOptionValue("time_limit", model.highs.getRunTime() + max(0.01, until - perf_counter()))
        values = model.solve(problem.budget)
        if values is None:
            return best, bound, model.highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible
        bound = max(bound, model.objective())
        parts = model.rounded(values)
        plan = simulated(problem, space.remakes(parts), "milp")
        best = cheaper(best, plan, problem.budget)
        if best.peak <= problem.budget and best.seconds * (1 - gap) <= bound * (1 + SLACK) + SLACK * model.seconds:
            return best, bound, True
        if plan.peak <= problem.budget or not add_row(model, space, parts, problem.budget):
            model.exclude(parts)
    return best, bound, False


def cheaper(best: Plan, plan: Plan, budget: int) -> Plan:
    """The nearer to the budget, then the cheaper, then the lower."""
    return min(best, plan, key=lambda p: (max(p.peak - budget, 0), p.seconds, p.peak))


def add_row(model: Model, space: Space, parts: Parts, budget: int) -> bool:
    """A memory row at the highest moment over the budget that has none yet."""
    held = space.bytes_at(parts)[0]
    over = [int(h) for h in np.argsort(-held, kind="stable") if held[h] > budget and int(h) not in model.rows]
    if over:
        model.add_row(over[0])
    return bool(over)
