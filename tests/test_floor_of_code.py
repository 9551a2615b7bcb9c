"""The tuner's floor, on a stand-in for Inductor whose code takes more than the plan says, by no rule."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from memopt import tuning
from memopt.fusion import Fences
from memopt.planned import Planned
from memopt.plans import Plan, Problem, Status
from memopt.tuning import tuned
from tests.report.conftest import planned as tiny
from tests.report.conftest import recompute

LEAST, FREE = 1000, 2000  # bytes: the solver's floor, and what the step takes unplanned


def solved(problem: Problem, *, time_limit: float = 0.0, bound: bool = True) -> Plan:
    """A plan of the budget's own bytes; which one is told by how its only remake is called."""
    peak = min(max(problem.budget, LEAST), FREE)
    remake = replace(recompute(problem.graph, 0), trade=f"{peak}")
    status = Status.FEASIBLE if peak <= problem.budget else Status.INFEASIBLE
    return Plan((remake,), peak, float(FREE - peak), 0.0, status, "frontier")


More = Callable[[int, Fences], float]  # by how much code exceeds its plan's peak, of that


def by_no_rule(seed: int) -> More:
    """0 to 20 %, less the tighter the fences."""
    return lambda peak, fences: random.Random(f"{seed} {peak} {fences}").uniform(0.0, 0.2 - 0.05 * fences)


def outcome(monkeypatch: pytest.MonkeyPatch, more: More, budget: int) -> Planned:
    """What is made of this budget where code takes so much more than its plan."""

    def phases(plan: Plan, fences: Fences) -> Any:
        peaks = {"backward": int(plan.peak * (1 + more(plan.peak, fences)))}
        return peaks, peaks

    monkeypatch.setattr(tuning, "solve", solved)
    result = tiny(budget)
    problem = Problem(result.before, (), budget)
    first = Planned(replace(result, plan=solved(problem)), problem, None, (), ())  # type: ignore[arg-type]
    return tuned(first, phases, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_every_refusal_names_the_same_floor_which_is_planned(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    more = by_no_rule(seed)
    floor = outcome(monkeypatch, more, 1).result.plan.floor
    assert floor is not None
    assert outcome(monkeypatch, more, floor).result.plan.peak <= floor
    assert outcome(monkeypatch, more, floor - 1).result.plan.floor == floor


def test_the_search_ends_where_the_code_is_the_lowest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = set[int]()

    def more(peak: int, fences: Fences) -> float:
        lowered.add(peak)
        return 0.0 if fences is Fences.TIGHT else 0.1

    assert outcome(monkeypatch, more, 1).result.plan.floor == LEAST
    assert lowered == {LEAST}
