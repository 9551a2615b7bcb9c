"""A tally is the edited graph in numbers: to the byte, to the bit of the seconds, and use by use."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.edit import Placer, Remake, edited_by
from memopt.plans import Problem, simulated
from memopt.solvers.tally import Tally
from memopt.timeline import lifetimes, timeline
from tests.solvers.test_packing import offers_of, step_of
from tests.synthetic import llama, random_step

Stays = dict[str, list[tuple[int | None, tuple[int, ...]]]]


def chosen_of(problem: Problem, rng: random.Random) -> tuple[Remake, ...]:
    """Some of the offers, whose spans are now and then cut in two, as gaps cut them."""
    late, found = problem.graph.steps[problem.graph.boundary :], list[Remake]()
    for remake in problem.remakes:
        if rng.random() < 0.6:
            found.append(remake)
        if remake.repeats and rng.random() < 0.4:
            first, last = sorted(rng.randrange(len(late)) for _ in range(2))
            found.append(replace(remake, span=(late[first].name, late[last].name)))
    return tuple(found)


def stays_of(problem: Problem, chosen: tuple[Remake, ...]) -> Stays:
    """Who uses what in the edited graph itself."""
    placer = Placer(problem.graph, chosen)
    edited = edited_by(placer, chosen)
    homes = {name: info.storage for name, info in edited.tensors.items()}
    made = {homes[copy]: (problem.graph.storage_of(t), i) for (t, i), copy in placer.copies.items() if copy in homes}
    found: Stays = {}
    for name in lifetimes(edited):
        value, index = made.get(name, (name, None))
        first, *uses = edited.uses.get(name, (-1,))
        stay = (index, (first, *(at for at in uses if at not in edited.viewing)))
        found.setdefault(value, []).append(stay)
    return found


def agrees(problem: Problem, chosen: tuple[Remake, ...]) -> None:
    run, plan = Tally(problem).run(chosen), simulated(problem, chosen, "test")
    edited = edited_by(Placer(problem.graph, chosen), chosen)
    assert tuple(run.held) == timeline(edited, problem.block)
    assert (run.peak, run.seconds) == (plan.peak, plan.seconds)
    values = {remake.value for remake in problem.remakes}
    found: Stays = {}
    for value, index, uses in run.stays(values):
        found.setdefault(value, []).append((index, uses))
    expected = {value: sorted(stays, key=str) for value, stays in stays_of(problem, chosen).items() if value in values}
    assert {value: sorted(stays, key=str) for value, stays in found.items()} == expected
    at = problem.graph.position
    known = [at.get(step.name) for step in edited.steps]
    following = [next((p for p in known[i:] if p is not None), len(at) - 1) for i in range(len(known))]
    assert run.place.tolist() == following


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_tally_is_the_edited_graph(seed: int, choice: int) -> None:
    """Random steps with views, fused and inlined steps and draws; what is made again, packed, stood in for, by spans
    that nest and meet."""
    graph, seconds = step_of(seed)
    rng = random.Random(seed)
    drawn = (replace(s, advances=s.pure and s.phase == "forward" and rng.random() < 0.2) for s in graph.steps)
    graph = replace(graph, steps=tuple(drawn))
    offers, spent = offers_of(graph, seconds, seed)
    problem = Problem(graph, offers, 0, spent, block=rng.choice((1, 16)))
    agrees(problem, chosen_of(problem, random.Random(choice)))


def test_a_step_with_more_layers_and_without_a_choice() -> None:
    for graph, seconds in (llama(3), random_step(5, steps=40)):
        problem = Problem(graph, offers_of(graph, seconds, 1)[0], 0, seconds, block=512)
        agrees(problem, chosen_of(problem, random.Random(1)))
        agrees(problem, ())


def test_a_plan_is_called_what_it_is() -> None:
    """Within the budget or not, as `simulated` says it."""
    graph, seconds = llama(2)
    offers = offers_of(graph, seconds, 1)[0]
    for budget in (1, 10**12):
        problem = Problem(graph, offers, budget, seconds)
        assert Tally(problem).plan(offers, "test") == simulated(problem, offers, "test")
