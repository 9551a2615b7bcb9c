"""Gaps opened and closed: what is predicted is what `edit` finds, and both moves do what they are for."""

from __future__ import annotations

from itertools import pairwise

import pytest

from memopt.edit import edit
from memopt.graph import verify
from memopt.passes.recompute import Recompute
from memopt.plans import Problem, Status, simulated
from memopt.solvers import solve
from memopt.solvers.engine import Engine
from memopt.solvers.gaps import Gaps, Played
from memopt.solvers.space import Space
from memopt.timeline import peak, timeline
from tests.synthetic import llama, random_step, unet


def problem_of(model: tuple, budget: int = 0) -> Problem:
    graph, seconds = model
    return Problem(graph, Recompute().propose(graph, seconds), budget, seconds, block=512)


def agrees(problem: Problem, played: Played) -> None:
    """Bytes at every step and seconds are those of the edited graph, which is well formed."""
    edited, plan = verify(edit(problem.graph, played.chosen)), simulated(problem, played.chosen, "test")
    assert tuple(played.held) == timeline(edited, problem.block)
    assert (played.peak, played.seconds) == (plan.peak, plan.seconds)


@pytest.mark.parametrize("model", [unet(3), llama(4), *(random_step(seed) for seed in range(20))])
def test_every_move_is_what_edit_finds(model: tuple) -> None:
    problem = problem_of(model)
    gaps = Gaps(problem)
    for played in gaps.descent(gaps.play(()), 0.9):
        agrees(problem, played)
        agrees(problem, gaps.filled(played, int(1.1 * played.peak)))


def test_a_descent_only_goes_down_and_closing_only_saves() -> None:
    gaps = Gaps(problem_of(unet()))
    way = list(gaps.descent(gaps.play(()), 0.95))
    assert len(way) > 10
    assert all(low.peak <= 0.95 * high.peak for high, low in pairwise(way))
    for played in way:
        found = gaps.filled(played, int(1.05 * played.peak))
        assert found.peak <= 1.05 * played.peak
        assert found.seconds <= played.seconds


def test_gaps_go_below_what_one_copy_a_region_reaches() -> None:
    """The skips of a U-Net are held through the whole step where a region may hold one copy only."""
    problem = problem_of(unet(5))
    one_a_region = Engine(Space(problem)).lowest()
    floor = solve(problem).floor
    assert floor < 0.9 * one_a_region.peak
    plan = solve(problem_of(unet(5), one_a_region.peak))
    assert plan.seconds < one_a_region.seconds


def test_nothing_is_moved_into_the_forward() -> None:
    """Copies are tagged as backward: no span may begin before it."""
    problem = problem_of(unet())
    gaps = Gaps(problem)
    *_, lowest = gaps.descent(gaps.play(()), 0.95)
    assert lowest.chosen
    assert all(problem.graph.position[r.span[0]] >= problem.graph.boundary for r in lowest.chosen)


def test_budgets_below_the_regions_floor_stay_in_order() -> None:
    model = unet(5)
    problem = problem_of(model)
    floor, top = solve(problem).floor, peak(problem.graph, problem.block)
    plans = [solve(problem_of(model, top - (top - floor) * i // 5)) for i in range(1, 6)]
    assert all(p.status is not Status.INFEASIBLE for p in plans)
    assert [p.peak for p in plans] == sorted((p.peak for p in plans), reverse=True)
    assert all(a.seconds <= b.seconds + 1e-12 for a, b in pairwise(plans))
