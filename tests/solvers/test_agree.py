"""Every solver against brute force on small random steps, and against the edited graph itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt import solvers
from memopt.edit import edit
from memopt.passes.recompute import Recompute
from memopt.plans import Plan, Problem, Status
from memopt.solvers import brute, greedy, milp, solve
from memopt.timeline import peak
from tests.synthetic import random_step


def problem_of(seed: int, share: float, most: int = 7) -> Problem:
    """A random step asked to run `share` of the way from its floor to its unconstrained peak."""
    graph, seconds = random_step(seed)
    offers = Recompute().propose(graph, seconds)[:most]
    floor = brute(Problem(graph, offers, 0, seconds)).floor
    return Problem(graph, offers, int(floor + share * (peak(graph) - floor)), seconds)


PROBLEMS = st.builds(problem_of, st.integers(0, 10**6), st.sampled_from((0.0, 0.3, 0.6, 0.95)))


def check(problem: Problem, plan: Plan) -> None:
    """What every plan of every solver must be true to."""
    assert plan.peak == peak(edit(problem.graph, plan.chosen), problem.block)
    assert (plan.status is Status.INFEASIBLE) == (plan.peak > problem.budget)
    assert 0.0 <= plan.lower_bound <= plan.seconds + 1e-9 or plan.status is Status.INFEASIBLE
    if plan.solver == "gaps":  # offers with their spans moved
        assert {r.value for r in plan.chosen} <= {r.value for r in problem.remakes}
    else:
        assert set(plan.chosen) <= set(problem.remakes)


def agrees(problem: Problem) -> None:
    """MILP finds what brute force finds."""
    want, got = brute(problem), milp(problem)
    check(problem, got)
    assert got.status is want.status
    assert got.seconds == pytest.approx(want.seconds)


def bounded(problem: Problem) -> None:
    """No bound is above the optimum, and what is called optimal is within its gap."""
    want, got = brute(problem), solve(problem)
    check(problem, got)
    if want.status is not Status.INFEASIBLE and got.status is not Status.INFEASIBLE:
        assert got.lower_bound <= want.seconds + 1e-9
        if got.solver != "gaps":  # those are no choice of the offers
            assert got.seconds >= want.seconds - 1e-9
        if got.status is Status.OPTIMAL:
            assert got.seconds <= want.seconds / 0.99 + 1e-9


@settings(max_examples=40, deadline=None)
@given(PROBLEMS)
def test_milp_is_brute_force_only_faster(problem: Problem) -> None:
    agrees(problem)


@settings(max_examples=40, deadline=None)
@given(PROBLEMS)
def test_no_bound_is_above_the_optimum(problem: Problem) -> None:
    bounded(problem)


@settings(max_examples=40, deadline=None)
@given(PROBLEMS)
def test_a_bound_sought_later_is_the_same_bound(problem: Problem) -> None:
    at_once, without = solve(problem), solve(problem, bound=False)
    assert without.lower_bound == 0.0
    assert without.status is not Status.OPTIMAL
    later = solvers.bounded(problem, without)
    assert (later.chosen, later.status) == (at_once.chosen, at_once.status)
    assert later.lower_bound == pytest.approx(at_once.lower_bound, rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(PROBLEMS)
def test_greedy_tells_the_truth(problem: Problem) -> None:
    plan = greedy(problem)
    check(problem, plan)
    assert plan.lower_bound == 0.0


def test_solve_finds_most_optima() -> None:
    """The frontier is a heuristic with a bound: over fixed cases it misses few feasible budgets and few optima."""
    cases = [problem_of(seed, share) for seed in range(25) for share in (0.0, 0.5)]
    pairs = [(brute(case), solve(case)) for case in cases]
    held = sum(got.peak <= case.budget for case, (_, got) in zip(cases, pairs, strict=True))
    equal = sum(got.seconds <= want.seconds + 1e-9 for want, got in pairs)
    assert held >= 0.94 * len(cases)
    assert equal >= 0.85 * len(cases)


def test_brute_refuses_what_it_cannot_finish() -> None:
    graph, seconds = random_step(2)
    offers = Recompute().propose(graph, seconds) * 10
    with pytest.raises(ValueError, match="at most 16"):
        brute(Problem(graph, offers, 0, seconds))


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(ValueError, match="auto, brute"):
        solve(problem_of(1, 0.5), method="oracle")
