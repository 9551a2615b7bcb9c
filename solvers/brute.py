"""The oracle of the tests: every subset of the offers."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from memopt.plans import Plan, Problem, Status, simulated

MOST = 16  # offers; 2**16 edits of a small graph take minutes


def brute(problem: Problem) -> Plan:
    """The subset of offers with least added seconds (then least bytes) within the budget, or that of least
    peak. Exact. Raises ValueError above MOST offers."""
    if len(problem.remakes) > MOST:
        raise ValueError(f"brute force over {len(problem.remakes)} offers; it takes at most {MOST}")
    offers = problem.remakes
    subsets = (chosen for size in range(len(offers) + 1) for chosen in combinations(offers, size))
    plans = [simulated(problem, chosen, "brute") for chosen in subsets]
    plans = [plan for plan in plans if problem.allows(plan.chosen)]
    lowest = min(plans, key=lambda plan: (plan.peak, plan.seconds))
    holding = [plan for plan in plans if plan.peak <= problem.budget]
    if not holding:
        return lowest
    best = min(holding, key=lambda plan: (plan.seconds, plan.peak, len(plan.chosen)))
    status = Status.OPTIMAL if best.chosen else Status.FITS
    return replace(best, status=status, lower_bound=best.seconds)
