"""The fast simulation against the edited graph, and what a mistake in it would break."""

from __future__ import annotations

import random

import pytest

from memopt.passes.recompute import Recompute
from memopt.plans import Problem, simulated
from memopt.solvers import region
from memopt.solvers.space import Parts, Space
from tests.synthetic import llama, random_step, unet


def subset(space: Space, seed: int) -> Parts:
    rng = random.Random(seed)
    return tuple(frozenset(v for v in r.offers if rng.random() < 0.6) for r in space.regions)


def space_of(model: tuple) -> Space:
    graph, seconds = model
    return Space(Problem(graph, Recompute().propose(graph, seconds), 0, seconds))


@pytest.mark.parametrize("model", [llama(4), unet()])
def test_equals_the_edited_graph_on_models(model: tuple) -> None:
    space = space_of(model)
    for parts in (space.all(), space.none(), *(subset(space, seed) for seed in range(5))):
        state, plan = space.state(parts), simulated(space.problem, space.remakes(parts), "test")
        assert state.peak == plan.peak
        assert state.seconds == pytest.approx(plan.seconds, abs=1e-9)


def never_below() -> tuple[int, int]:
    equal = 0
    for seed in range(150):
        space = space_of(random_step(seed))
        parts = subset(space, seed)
        state, plan = space.state(parts), simulated(space.problem, space.remakes(parts), "test")
        assert state.peak >= plan.peak
        assert state.seconds >= plan.seconds - 1e-9
        equal += state.peak == plan.peak
    return equal, 150


def test_is_never_below_the_edited_graph() -> None:
    equal, of = never_below()
    assert equal >= 0.8 * of


def test_a_simulation_without_transients_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region.Walk, "top", lambda self, when, makers: 0)
    with pytest.raises(AssertionError):
        never_below()
