"""Copies that go on while the step computes: their moments, their seconds, and what bounds them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.edit import DISK, TOKEN, Remake, edit
from memopt.graph import Step, StepGraph, Storage, TensorInfo, verify
from memopt.overlap import moves, overlapped, waits_of
from memopt.passes.packing import packable, packed, read_late
from memopt.passes.recompute import Recompute
from memopt.plans import Plan, Problem, Status, added_seconds, simulated
from memopt.solvers import overlapped as overlapped_solver
from memopt.solvers import solve
from memopt.solvers.engine import Engine
from memopt.solvers.moments import Moments, just_in_time, timed, wanted
from memopt.solvers.overlapped import beside, hiding, remakes_of, solve_overlapped
from memopt.solvers.space import Space
from memopt.timeline import peak, timeline
from tests.synthetic import mlp, random_step

LARGE = 100  # times a random step's bytes: a value is larger than its token


def enlarged(graph: StepGraph) -> StepGraph:
    """The same step with LARGE tensors."""
    tensors = {n: replace(t, shape=tuple(LARGE * size for size in t.shape)) for n, t in graph.tensors.items()}
    storages = {n: replace(s, nbytes=LARGE * s.nbytes) for n, s in graph.storages.items()}
    return replace(graph, tensors=tensors, storages=storages)


def problem_of(seed: int, share: float, steps: int = 7, most: int = 8, again: bool = True) -> Problem:
    """Moves of most values and recomputation, at a budget so far between the least and the most bytes."""
    rng = random.Random(seed)
    graph, seconds = random_step(seed, steps)
    graph = enlarged(graph)
    values = [value for value in packable(graph) if rng.random() < 0.7]
    remakes = {v: replace(packed(graph, "move", v, ("disk_0", TOKEN)), takes=((DISK, 1.0),)) for v in values}
    spent = dict(seconds)
    for remake in remakes.values():
        spent |= {step.name: rng.choice((1.0, 5.0, 30.0)) for step in (*remake.pack, *remake.unpack)}
    late = (replace(remakes[value], span=span) for span, value in read_late(graph, remakes.keys()))
    offers = [*(Recompute().propose(graph, seconds) if again else ()), *late]
    rng.shuffle(offers)
    problem = Problem(graph, tuple(offers[:most]), 0, spent)
    floor = solve(problem).peak
    return replace(problem, budget=int(floor + share * (peak(graph) - floor)))


PROBLEMS = st.builds(problem_of, st.integers(0, 10**6), st.sampled_from((0.0, 0.3, 0.6, 0.9)))


@settings(max_examples=40, deadline=None)
@given(PROBLEMS)
def test_no_plan_is_dearer_than_with_awaited_copies_nor_over_the_budget(problem: Problem) -> None:
    awaited, plan = solve(problem), solve_overlapped(problem)
    edited = verify(edit(problem.graph, plan.chosen))
    assert (plan.peak, plan.seconds) == (peak(edited), added_seconds(problem, edited))
    assert (plan.peak <= problem.budget) == (awaited.peak <= problem.budget)
    assert plan.lower_bound <= plan.seconds <= awaited.seconds
    place = problem.graph.position
    assert all(place[r.drained] < place[r.fetched] for r in plan.chosen if r.drained)  # none is wanted while in flight


def every_moment(problem: Problem, chosen: tuple[Remake, ...]) -> Iterator[tuple[Remake, ...]]:
    """The remakes with all copies awaited, and with every pair of moments that they can have. One awaited beside others
    on their way would take its seconds of the same link, of which `spent` knows nothing: no plan has one."""
    yield chosen
    graph, ways = problem.graph, []
    begun = just_in_time(graph, chosen)
    for remake, moved in zip(chosen, begun, strict=True):
        found = [] if moved.drained else [remake]
        if moved.drained:
            made, read = graph.position[moved.drained], graph.position[moved.fetched]
            late = range(graph.boundary, read + 1)
            found += [
                overlapped(remake, graph.steps[out].name, graph.steps[back].name)
                for out, back in product(range(made, graph.boundary), late)
            ]
        ways.append(found)
    for each in product(*ways):
        drained = {(r.value, r.drained) for r in each if moves(r)}
        if len(drained) == len({value for value, _ in drained}):  # a value is copied out once
            yield each


def least(problem: Problem) -> Plan | None:
    """The cheapest within the budget of all subsets of the offers and all their moments."""
    offers = problem.remakes
    subsets = (chosen for size in range(len(offers) + 1) for chosen in combinations(offers, size))
    plans = (simulated(problem, each, "all") for chosen in subsets for each in every_moment(problem, chosen))
    return min((p for p in plans if p.peak <= problem.budget), key=lambda p: p.seconds, default=None)


def test_the_bound_is_below_every_choice_and_every_moment() -> None:
    """All of them, on small random steps; the moments chosen are the best ones in most, and the bound is theirs."""
    best = close = plans = 0
    for seed in range(60):
        problem = problem_of(seed, 0.3, steps=4, most=2, again=seed % 4 == 0)
        plan, found = solve_overlapped(problem), least(problem)
        if found is None or not any(map(moves, plan.chosen)):
            continue
        assert plan.lower_bound <= found.seconds * (1 + 1e-9) + 1e-9
        assert found.seconds <= plan.seconds + 1e-9
        plans += 1
        best += plan.seconds <= found.seconds + 1e-9
        close += plan.lower_bound >= 0.999 * found.seconds
    assert plans >= 5
    assert best >= plans - 1
    assert close >= plans - 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_at_every_step_moments_hold_at_least_what_awaited_copies_hold(seed: int, choice: int) -> None:
    """What the bound rests on."""
    problem, rng = problem_of(seed, 0.5), random.Random(choice)
    chosen = wanted(problem.graph, [remake for remake in problem.remakes if rng.random() < 0.7])
    where = {remake.value: rng.random() for remake in chosen}
    begun = []
    for remake in just_in_time(problem.graph, chosen):
        if remake.drained:
            made, read = (problem.graph.position[name] for name in (remake.drained, remake.fetched))
            out = made + int(where[remake.value] * (problem.graph.boundary - made))
            back = rng.randint(problem.graph.boundary, read)
            remake = overlapped(remake, problem.graph.steps[out].name, problem.graph.steps[back].name)
        begun.append(remake)
    awaited, under_way = (edit(problem.graph, each) for each in (chosen, tuple(begun)))
    verify(under_way)
    low, high = (dict(zip((s.name for s in g.steps), timeline(g), strict=True)) for g in (awaited, under_way))
    assert all(low[name] <= high[name] for name in low.keys() & high.keys() & problem.graph.position.keys())
    assert added_seconds(problem, under_way) <= added_seconds(problem, awaited) + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_moves_that_nobody_reads_share_the_moments_of_those_that_are_read(seed: int) -> None:
    """One copy out of a value serves all its remakes; where one was awaited and another not, neither could be timed."""
    problem, rng = problem_of(seed, 0.5, steps=10, most=14), random.Random(seed)
    plan = timed(problem, tuple(remake for remake in problem.remakes if rng.random() < 0.5))
    edited = verify(edit(problem.graph, plan.chosen))
    assert plan.seconds == added_seconds(problem, edited)
    ways = {(remake.value, bool(remake.drained)) for remake in plan.chosen if moves(remake)}
    assert len(ways) == len({value for value, _ in ways})


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from((0.0, 0.2, 0.5)))
def test_no_moment_is_chosen_that_there_is_no_room_for(seed: int, more: float) -> None:
    """Also between two steps, where a copy out is waited for: a kernel's results are in no other's place by then."""
    problem, rng = problem_of(seed, 0.5, steps=10, most=14, again=seed % 2 == 0), random.Random(seed)
    graph = problem.graph
    merged = {s.name for s in graph.steps if s.pure and not graph.is_view(s) and rng.random() < 0.6}
    graph = replace(graph, steps=tuple(replace(s, fused=s.name in merged) for s in graph.steps))
    begun = just_in_time(graph, wanted(graph, problem.remakes))
    least = simulated(replace(problem, graph=graph), begun, "").peak
    problem = replace(problem, graph=graph, budget=int(least + more * (peak(graph) - least)))
    assert simulated(problem, Moments(problem, begun).chosen(), "").peak <= max(least, problem.budget)


def chained(slow: float, share: float) -> Problem:
    """A residual chain whose values move over a link that takes `slow` times the seconds of a value's own step."""
    graph, seconds = mlp(8)
    values = [value for value in packable(graph) if graph.storages[value].nbytes > 1000]
    moved = {v: replace(packed(graph, "move", v, ("disk_0", TOKEN)), takes=((DISK, 1.0),)) for v in values}
    copies = {s.name: slow * max(seconds.values()) for r in moved.values() for s in (*r.pack, *r.unpack)}
    late = tuple(replace(moved[value], span=span) for span, value in read_late(graph, moved.keys()))
    problem = Problem(graph, (*Recompute().propose(graph, seconds), *late), 0, seconds | copies)
    floor = solve(problem).peak
    return replace(problem, budget=int(floor + share * (peak(graph) - floor)))


@pytest.mark.parametrize(("slow", "share", "proven"), [(4, 0.5, 0.8), (8, 0.5, 0.99)])
def test_the_bound_knows_the_link(slow: float, share: float, proven: float) -> None:
    """Copies that nothing is left to hide are waited for, whatever their moments."""
    plan = solve_overlapped(chained(slow, share))
    assert plan.seconds > 0.0
    assert plan.gap <= 1 - proven
    assert (plan.status is Status.OPTIMAL) == (plan.gap <= 0.01)


def test_each_way_of_the_link_has_its_own_part_of_the_step() -> None:
    """What the forward leaves over hides no copy back, and what is left of the rest hides none out."""
    problem = chained(8, 0.3)
    graph = problem.graph
    offers = tuple(filter(moves, problem.remakes))
    for mine in (graph.steps[: graph.boundary], graph.steps[graph.boundary :]):
        longer = {step.name: 100 * problem.cost(step) for step in mine}
        there = replace(problem, remakes=offers, seconds={**problem.seconds, **longer})
        plan = solve_overlapped(there)
        assert plan.lower_bound > 0.5 * plan.seconds > 0.0


@pytest.mark.parametrize(("slow", "share"), [(2, 0.1), (4, 0.5), (8, 0.5)])
def test_no_more_moves_than_the_link_can_hide_where_the_rest_is_made_again_for_less(slow: float, share: float) -> None:
    """The step would wait for all copies, and making everything again takes longer than some of both."""
    problem = chained(slow, share)
    plan, awaited = solve_overlapped(problem), solve(problem)
    everything = timed(problem, remakes_of(problem, solve(hiding(problem)).chosen))
    assert plan.seconds < 0.8 * min(awaited.seconds, everything.seconds)
    assert {remake.trade for remake in plan.chosen} == {"move", "recompute"}
    assert plan.peak <= problem.budget
    assert all(dict(remake.takes).keys() <= {DISK} for remake in plan.chosen)  # the row is the planner's own


@pytest.mark.parametrize(("slow", "share", "before", "then"), [(3, 0.3, 1, 4), (2, 0.1, 4, 6)])
def test_fewer_seconds_of_copies_are_tried_and_then_some_beside_the_cheapest(
    slow: float, share: float, before: int, then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the relaxation makes may still be waited for; what nobody waits for may be too few."""
    seconds = []
    for tries in (before, then):
        monkeypatch.setattr(overlapped_solver, "TRIES", tries)
        seconds.append(solve_overlapped(chained(slow, share), bound=False).seconds)
    assert seconds[1] < 0.7 * seconds[0]


def test_a_wait_takes_its_own_seconds_beside_those_of_the_copy() -> None:
    """What stays of a part is copied there, by what computes."""
    problem = chained(1, 0.7)
    (moved, *_) = (remake for remake in solve_overlapped(problem).chosen if remake.drained)
    whole = edit(problem.graph, [moved])
    own = dict(zip(waits_of(moved), (2.0, 3.0), strict=True))
    slower = replace(problem, seconds={**problem.seconds, **own})
    assert added_seconds(slower, whole) == pytest.approx(added_seconds(problem, whole) + 5.0)
    for share in (0.0, 1.0):
        priced = hiding(slower, share).seconds
        assert [priced[s.name] - hiding(problem, share).seconds[s.name] for s in (moved.pack[0], moved.unpack[0])] == (
            pytest.approx([2.0, 3.0])
        )


def kernels_in_a_row(values: int) -> tuple[StepGraph, tuple[Remake, ...]]:
    """Values of 100 bytes, last read in the forward by a kernel whose result of 200 takes an input's place."""
    names = [f"v{k}" for k in range(values)]
    forward = [
        *(Step(name, name, "forward", ("x",), (name,)) for name in names),
        Step("w", "w", "forward", ("x",), ("w",)),
        Step("f", "f", "forward", (*names, "w"), ("f",), fused=True),
        Step("loss", "loss", "forward", ("f",), ("loss",)),
    ]
    late = [Step(f"{name}.d", "d", "backward", (name, "loss"), (f"{name}.d",)) for name in names]
    sizes = {"x": 10, "w": 150, "f": 200, "loss": 4} | dict.fromkeys(names, 100) | {f"{name}.d": 4 for name in names}
    storages = {name: Storage(name, size) for name, size in sizes.items()}
    tensors = {name: TensorInfo(name, (size,), "uint8", name) for name, size in sizes.items()}
    graph = StepGraph(("x",), (*forward, *late), tuple(step.name for step in late), tensors, storages)
    made = (packed(verify(graph), "move", name, ("disk_0", TOKEN)) for name in names)
    spans = (replace(r, span=(f"{r.value}.d", f"{r.value}.d"), takes=((DISK, 1.0),)) for r in made)
    return graph, tuple(spans)


@pytest.mark.parametrize("again", [False, True])
def test_the_bound_holds_for_parts_whose_rest_is_copied_late(again: bool) -> None:
    """A value is read once more early in the backward, and lives as long; a part of it comes back later. Until the
    forward ends, what stays of it need not lie beside it. again: for the early read it might be made again, dearly."""
    sizes = {"a": 8000, "third": 12000, "wide": 13000} | dict.fromkeys(
        ("x", "short", "loss", "seed", "a.d1", "less", "a.d2"), 4
    )
    steps = (
        Step("a", "a", "forward", ("x",), ("a",)),
        Step("short", "short", "forward", ("a",), ("short",)),
        Step("third", "third", "forward", ("short",), ("third",)),
        Step("loss", "loss", "forward", ("third",), ("loss",)),
        Step("seed", "d", "backward", ("loss",), ("seed",)),
        Step("a.d1", "d", "backward", ("a", "seed"), ("a.d1",)),
        Step("wide", "wide", "backward", ("a.d1",), ("wide",)),
        Step("less", "less", "backward", ("wide",), ("less",)),
        Step("a.d2", "d", "backward", ("a", "less"), ("a.d2",)),
    )
    storages = {name: Storage(name, size) for name, size in sizes.items()}
    tensors = {name: TensorInfo(name, (size,), "uint8", name) for name, size in sizes.items()}
    graph = verify(StepGraph(("x",), steps, ("a.d2",), tensors, storages))
    move = packed(graph, "move", "a", ("disk1of4_0", TOKEN + 6000))
    part = replace(move, span=("a.d2", "a.d2"), takes=((DISK, 2000.0),))
    seconds = dict.fromkeys(graph.position, 10.0) | {step.name: 15.0 for step in (*part.pack, *part.unpack)}
    seconds["a"] = 1000.0
    early = [replace(r, span=("seed", "a.d1")) for r in Recompute().propose(graph, seconds) if r.value == "a"]
    problem = Problem(graph, (*(early if again else ()), part), 0, seconds)
    by_hand = simulated(problem, (overlapped(part, "loss", "a.d2"),), "")
    assert by_hand.peak < peak(graph)
    engine = Engine(Space(beside(replace(problem, budget=by_hand.peak))))
    bound = engine.bound(by_hand.peak)
    assert bound is not None
    assert bound <= by_hand.seconds + 1e-6


def test_a_move_that_another_values_maker_serves_in_passing_shares_no_copy() -> None:
    """A step makes two values and runs again for one: there the other needs no copy back, later it does."""
    sizes = {"u": 1000, "v": 1000} | dict.fromkeys(("x", "loss", "seed", "first", "second"), 4)
    steps = (
        Step("pair", "pair", "forward", ("x",), ("u", "v")),
        Step("loss", "loss", "forward", ("u", "v"), ("loss",)),
        Step("seed", "d", "backward", ("loss",), ("seed",)),
        Step("first", "d", "backward", ("u", "v", "seed"), ("first",)),
        Step("second", "d", "backward", ("v", "first"), ("second",)),
    )
    storages = {name: Storage(name, size) for name, size in sizes.items()}
    tensors = {name: TensorInfo(name, (size,), "uint8", name) for name, size in sizes.items()}
    graph = verify(StepGraph(("x",), steps, ("second",), tensors, storages))
    offered = Recompute().propose(graph, {"pair": 1.0})
    again = replace(next(remake for remake in offered if remake.value == "u"), span=("seed", "first"))
    move = replace(packed(graph, "move", "v", ("disk_0", TOKEN)), span=("seed", "first"), takes=((DISK, 1.0),))
    chosen = (again, move, replace(move, span=("second", "second")))
    seconds = dict.fromkeys(graph.position, 1.0) | {step.name: 1.0 for step in (*move.pack, *move.unpack)}
    problem = Problem(graph, chosen, 10_000, seconds)
    plan = timed(problem, chosen)
    assert [(r.trade, r.value) for r in plan.chosen if not r.drained] == [("recompute", "u"), ("recompute", "v")]
    assert len([remake for remake in plan.chosen if remake.drained]) == 1
    assert plan.seconds == pytest.approx(1.0)  # of the step that runs again
    same, before = (simulated(problem, each, "") for each in (wanted(graph, chosen), chosen))
    assert (same.peak, same.seconds) == (before.peak, before.seconds)


def test_what_is_made_again_hides_copies_too() -> None:
    """Neither of two values has room beside a third; one comes back while the other is made again, for 10 seconds."""
    forward = [
        Step("a", "a", "forward", ("x",), ("a",)),
        Step("b", "b", "forward", ("x",), ("b",)),
        Step("short", "short", "forward", ("a", "b"), ("short",)),
        Step("third", "third", "forward", ("short",), ("third",)),
        Step("loss", "loss", "forward", ("third",), ("loss",)),
    ]
    late = [Step("seed", "d", "backward", ("loss",), ("seed",))]
    late += [Step(f"{name}.d", "d", "backward", (name, "seed"), (f"{name}.d",)) for name in "ab"]
    small = ("x", "short", "loss", "seed", "a.d", "b.d")
    sizes = {"a": 1000, "b": 1000, "third": 1500} | dict.fromkeys(small, 4)
    storages = {name: Storage(name, size) for name, size in sizes.items()}
    tensors = {name: TensorInfo(name, (size,), "uint8", name) for name, size in sizes.items()}
    graph = verify(StepGraph(("x",), (*forward, *late), ("a.d", "b.d"), tensors, storages))
    move = replace(packed(graph, "move", "b", ("disk_0", TOKEN)), span=("seed", "b.d"), takes=((DISK, 1.0),))
    (again,) = (remake for remake in Recompute().propose(graph, {"a": 10.0}) if remake.value == "a")
    seconds = {"a": 10.0, "b": 12.0, "short": 9.0} | {step.name: 9.0 for step in (*move.pack, *move.unpack)}
    problem = Problem(graph, (replace(again, span=move.span), move), 2200, seconds)
    plan = solve_overlapped(problem)
    assert {remake.trade for remake in plan.chosen} == {"move", "recompute"}
    assert plan.lower_bound == pytest.approx(plan.seconds) == pytest.approx(10.0)


@pytest.mark.parametrize(("values", "behind"), [(1, ["w"]), (2, ["f", "w"])])
def test_a_copy_is_not_waited_for_behind_a_kernel_whose_result_has_no_room_beside_it(
    values: int, behind: list[str]
) -> None:
    """One value: 100 and the result's 200 exceed what the kernel itself holds; of two one has room, but not both."""
    graph, offers = kernels_in_a_row(values)
    begun = just_in_time(graph, offers)
    seconds = {s.name: 1.0 for s in graph.steps} | {s.name: 2.5 for r in offers for s in (*r.pack, *r.unpack)}
    problem = Problem(graph, offers, peak(edit(graph, begun)) + values * TOKEN, seconds)
    chosen = Moments(problem, begun).chosen()
    assert sorted(remake.drained for remake in chosen) == behind
    assert peak(edit(graph, chosen)) <= problem.budget
