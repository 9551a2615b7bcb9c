"""Recursion below the sum of the block boundaries."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from memopt.edit import edit
from memopt.graph import verify
from memopt.passes.recompute import Recompute
from memopt.plans import Problem, Status
from memopt.solvers import chain, milp, solve
from memopt.solvers.chain import levels, links_of, lowest, segments
from memopt.solvers.passing import in_passing, uniform
from memopt.solvers.space import Space
from memopt.timeline import peak
from tests.synthetic import llama, mlp


def problem_of(model: tuple, budget: int = 0) -> Problem:
    graph, seconds = model
    return Problem(graph, Recompute().propose(graph, seconds), budget, seconds)


def test_segments_go_far_below_the_boundaries() -> None:
    """40 equal boundaries: keeping them all takes 40 units, two levels about 2 * sqrt(2 * 40) at most."""
    problem = problem_of(mlp(40))
    plan = chain(problem)
    graph = edit(problem.graph, plan.chosen)
    verify(graph)
    assert plan.peak == peak(graph)
    assert plan.peak < 18 * (1 << 20)
    flat = milp(problem, time_limit=2.0)
    assert flat.floor is not None
    assert plan.peak < 0.5 * flat.floor


def test_the_estimate_is_what_edit_finds() -> None:
    problem = problem_of(llama(12, tokens=2048, width=32, vocab=64))
    space = Space(problem)
    links = links_of(problem, space)
    assert links is not None
    _, estimate = lowest(links, peak(problem.graph))
    assert chain(problem).peak == pytest.approx(estimate, rel=0.01)


def test_less_room_means_longer_segments() -> None:
    problem = problem_of(mlp(24))
    space = Space(problem)
    links = links_of(problem, space)
    assert links is not None
    counts = []
    for budget in (40 << 20, 20 << 20, 14 << 20):
        found = segments(links, budget)
        assert found is not None
        assert [i for first, last in found for i in range(first, last + 1)] == list(range(len(links.regions)))
        counts.append(len(found))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert segments(links, 3 << 20) is None


@pytest.mark.long
@pytest.mark.parametrize(
    "model", [mlp(20), llama(6, tokens=2048, width=32, vocab=64)], ids=["below the boundaries", "above"]
)
def test_the_planner_stays_monotone_across_both_regimes(model: tuple) -> None:
    problem = problem_of(model)
    top, floor = peak(problem.graph), solve(problem).floor
    plans = [solve(replace(problem, budget=top - (top - floor) * i // 10)) for i in range(1, 11)]
    assert all(p.status is not Status.INFEASIBLE for p in plans)
    assert [p.peak for p in plans] == sorted((p.peak for p in plans), reverse=True)
    assert all(a.seconds <= b.seconds + 1e-12 for a, b in pairwise(plans))


def test_segments_cover_the_chain_and_are_equal_but_for_the_first() -> None:
    assert uniform(7, 3) == ((0, 0), (1, 3), (4, 6))
    assert uniform(6, 3) == ((0, 2), (3, 5))
    assert uniform(4, 1) == ((0, 0), (1, 1), (2, 2), (3, 3))


def test_kept_in_passing_a_segment_costs_one_more_forward() -> None:
    """The chain's levels make what lies inside a block twice."""
    problem = problem_of(mlp(24))
    links = links_of(problem, Space(problem))
    assert links is not None
    forward = sum(problem.seconds[step.name] for step in problem.graph.steps[: problem.graph.boundary])
    for plan in in_passing(problem, links):
        verify(edit(problem.graph, plan.chosen))
        assert plan.seconds <= forward
    low = min(plan.peak for plan in in_passing(problem, links))
    assert any(plan.seconds > forward and plan.peak > low for plan in levels(problem, links, peak(problem.graph)))
