"""Values that may also be unpacked: the solvers against brute force, the fast simulation against the edited graph."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.edit import DISK, GRADIENT, Remake, edit
from memopt.graph import StepGraph, verify
from memopt.passes.packing import packable, packed, read_late
from memopt.passes.recompute import Recompute
from memopt.plans import Problem, simulated
from memopt.solvers import brute, solve
from memopt.solvers.chain import links_of
from memopt.solvers.planner import heavy
from memopt.solvers.space import Space
from memopt.timeline import peak
from tests.solvers.test_agree import agrees, bounded
from tests.synthetic import random_step


def step_of(seed: int) -> tuple[StepGraph, dict[str, float]]:
    """A random step, every second time with fused steps, which unpack in their own loops."""
    graph, seconds = random_step(seed)
    rng = random.Random(seed)
    share = rng.choice((0.0, 0.7))
    steps = tuple(replace(s, fused=s.pure and not graph.is_view(s) and rng.random() < share) for s in graph.steps)
    return replace(graph, steps=steps), seconds


def offers_of(graph: StepGraph, seconds: dict[str, float], seed: int) -> tuple[tuple[Remake, ...], dict[str, float]]:
    """Recomputation and, for some of the values, one or two codecs; seconds with those of packing and unpacking."""
    rng = random.Random(seed)
    offers, spent = [*Recompute().propose(graph, seconds)], dict(seconds)
    for name, share in (("half", 2), ("eighth", 8)):
        values = [value for value in packable(graph) if rng.random() < 0.5]
        remakes = {v: packed(graph, name, v, (name, graph.storages[v].nbytes // share)) for v in values}
        for remake in remakes.values():
            for step in (*remake.pack, *remake.unpack):
                spent[step.name] = rng.choice((0.2, 1.0, 5.0)) * 1e-5
        for value, remake in remakes.items():
            workspace = rng.choice((0, 0, 64))
            pack = tuple(replace(step, workspace=workspace) for step in remake.pack)
            inlined = rng.random() < 0.6
            unpack = tuple(replace(step, workspace=workspace, inlined=inlined) for step in remake.unpack)
            takes = ((GRADIENT, rng.choice((0.0, 0.01, 0.04))), (DISK, rng.choice((0.0, 1.0, 2.0))))
            remakes[value] = replace(remake, pack=pack, unpack=unpack, takes=takes, stand_in=rng.random() < 0.3)
        offers += [replace(remakes[v], span=span) for span, v in read_late(graph, remakes.keys())]
    rng.shuffle(offers)
    return tuple(offers), spent


def problem_of(seed: int, share: float, limits: Mapping[str, float], most: int = 8) -> Problem:
    graph, seconds = step_of(seed)
    offers, spent = offers_of(graph, seconds, seed)
    problem = Problem(graph, offers[:most], 0, spent, limits=limits)
    floor = brute(problem).peak
    return replace(problem, budget=int(floor + share * (peak(graph) - floor)))


LIMITS = st.sampled_from(({}, {GRADIENT: 0.06}, {GRADIENT: 0.02, DISK: 3.0}, {GRADIENT: 0.0}))
PROBLEMS = st.builds(problem_of, st.integers(0, 10**6), st.sampled_from((0.0, 0.3, 0.6, 0.95)), LIMITS)


@settings(max_examples=40, deadline=None)
@given(PROBLEMS)
def test_milp_is_brute_force_only_faster(problem: Problem) -> None:
    agrees(problem)


@settings(max_examples=40, deadline=None)
@given(PROBLEMS)
def test_no_bound_is_above_the_optimum(problem: Problem) -> None:
    bounded(problem)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_fast_simulation_is_never_below_the_edited_graph(seed: int, choice: int) -> None:
    graph, seconds = step_of(seed)
    offers, spent = offers_of(graph, seconds, seed)
    problem = Problem(graph, offers, 0, spent)
    space, rng = Space(problem), random.Random(choice)
    assert space.separable
    parts = tuple(
        frozenset(rng.choice(ways) for ways in region.values.values() if rng.random() < 0.5) for region in space.regions
    )
    state, plan = space.state(parts), simulated(problem, space.remakes(parts), "test")
    verify(edit(graph, plan.chosen))
    assert state.peak >= plan.peak
    assert state.seconds >= plan.seconds - 1e-12


@settings(max_examples=60, deadline=None)
@given(PROBLEMS, st.sampled_from(("auto", "milp", "greedy", "chain")))
def test_no_plan_takes_more_than_there_is(problem: Problem, method: str) -> None:
    if method != "chain" or links_of(problem, Space(problem)) is not None:
        assert problem.allows(solve(problem, method=method).chosen)


def test_a_tighter_limit_gives_other_ways_and_no_cheaper_plan() -> None:
    """On some random steps the loosest plan is too noisy, and one that is not costs more seconds or bytes."""
    dearer = 0
    for seed in range(40):
        loose = problem_of(seed, 0.3, {})
        tight = replace(loose, limits={GRADIENT: 0.02})
        free, held = solve(loose), solve(tight)
        if not tight.allows(free.chosen):
            assert (held.peak > loose.budget) or held.seconds >= free.seconds * (1 - 1e-9)
            dearer += 1
    assert dearer


def test_what_nobody_unpacks_is_not_packed() -> None:
    graph, seconds = step_of(3)
    offers, _ = offers_of(graph, seconds, 3)
    first = next(remake for remake in offers if remake.pack)
    unread = replace(first, span=(graph.steps[0].name, graph.steps[0].name))
    assert edit(graph, (unread,)).steps == edit(graph, (replace(unread, pack=()),)).steps
    assert first.pack[0].name not in edit(graph, (unread,)).position


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from((0.1, 0.4, 0.8)))
def test_more_offers_never_make_a_dearer_plan(seed: int, share: float) -> None:
    graph, seconds = step_of(seed)
    offers, spent = offers_of(graph, seconds, seed)
    again = tuple(offer for offer in offers if offer.repeats)
    floor = solve(Problem(graph, again, 0, spent)).peak
    budget = int(floor + share * (peak(graph) - floor))
    few, many = solve(Problem(graph, again, budget, spent)), solve(Problem(graph, offers, budget, spent))
    assert many.peak <= budget
    assert many.seconds <= few.seconds + 1e-12
    for trade in {offer.trade for offer in offers if heavy(Problem(graph, offers, budget, spent), offer.trade)}:
        alone = solve(Problem(graph, tuple(offer for offer in offers if offer.trade == trade), budget, spent))
        assert alone.peak > budget or many.seconds <= alone.seconds + 1e-12


@pytest.mark.parametrize(("seed", "share"), [pytest.param(1, 0.1, marks=pytest.mark.long), (6, 0.4)])
def test_consent_never_makes_a_dearer_plan(seed: int, share: float) -> None:
    """On steps large enough that heuristics answer, which may do worse with more offers."""
    graph, seconds = random_step(seed, 60)
    found, spent = offers_of(graph, seconds, seed)
    offers = tuple(replace(o, takes=()) if o.trade == "eighth" else o for o in found)
    exact = tuple(offer for offer in offers if offer.trade != "half")
    floor = solve(Problem(graph, exact, 0, spent)).peak
    budget = int(floor + share * (peak(graph) - floor))
    few, many = (solve(Problem(graph, these, budget, spent)) for these in (exact, offers))
    assert few.peak <= budget
    assert many.peak <= budget
    assert many.seconds <= few.seconds + 1e-12
