"""The judge of the planners: what is held when, and which schedules are no schedules of the step at all."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from benchmarks.planners.schedule import Run, Schedule, ScheduleError, check, explicit, from_edited, pruned
from benchmarks.planners.simulator import simulate
from memopt.edit import edit
from memopt.graph import Step, StepGraph, Storage, TensorInfo
from memopt.passes.recompute import Recompute
from memopt.timeline import timeline
from tests.synthetic import random_step


def graph_of(steps: Sequence[Step], sizes: dict[str, int], inputs: Sequence[str], outputs: Sequence[str],
             views: dict[str, str] | None = None) -> StepGraph:  # fmt: skip
    """A graph by hand: sizes of storages in bytes; views: tensor -> storage it lies in."""
    homes = {**{name: name for name in sizes}, **(views or {})}
    tensors = {name: TensorInfo(name, (), "", home) for name, home in homes.items()}
    return StepGraph(tuple(inputs), tuple(steps), tuple(outputs), tensors, {n: Storage(n, b) for n, b in sizes.items()})


def small() -> StepGraph:
    """x -> a -> v (a view of a) -> b; backward: db reads v and b, da reads db."""
    steps = [
        Step("a", "a", "forward", ("x",), ("a",), workspace=5),
        Step("v", "v", "forward", ("a",), ("v",)),
        Step("b", "b", "forward", ("v",), ("b",)),
        Step("seed", "seed", "backward", (), ("s",), pure=False),
        Step("db", "db", "backward", ("s", "v", "b"), ("db",)),
        Step("da", "da", "backward", ("db",), ("da",)),
    ]
    sizes = {"x": 10, "a": 100, "b": 30, "s": 1, "db": 40, "da": 7}
    return graph_of(steps, sizes, ("x",), ("da",), {"v": "a"})


ONCE = ("a", "v", "b", "seed", "db", "da")


def test_the_simulator_knows_what_is_held_when() -> None:
    """By hand: the input throughout, a with its view until db, workspace only in its run, the output to the end."""
    graph = small()
    score = simulate(graph, dict.fromkeys(ONCE, 1.0), explicit(graph, ONCE))
    assert score.held == (115, 110, 140, 141, 181, 57)
    assert (score.peak, score.seconds) == (181, 6.0)


def test_what_is_made_again_lets_the_first_go() -> None:
    """a and v again before db: the first a ends with b, and the second takes its workspace anew."""
    graph = small()
    score = simulate(graph, {"a": 2.0}, explicit(graph, ("a", "v", "b", "seed", "a", "v", "db", "da")))
    assert score.held == (115, 110, 140, 41, 146, 141, 181, 57)
    assert score.seconds == 4.0


def test_bytes_are_rounded_to_blocks() -> None:
    graph = small()
    assert simulate(graph, {}, explicit(graph, ONCE), 64).held == (256, 192, 256, 320, 384, 192)


def test_an_output_is_the_callers_from_its_first_run() -> None:
    """The loss made again is a second one; the first stays."""
    steps = [Step("l", "l", "forward", ("x",), ("l",)), Step("d", "d", "backward", ("l",), ("d",))]
    graph = graph_of(steps, {"x": 1, "l": 10, "d": 100}, ("x",), ("l", "d"))
    assert simulate(graph, {}, explicit(graph, ("l", "l", "d"))).held == (11, 21, 121)


def test_a_draw_made_again_holds_the_generators_state() -> None:
    steps = [
        Step("state", "state", "forward", (), ("state",), pure=False),
        Step("m", "m", "forward", ("state", "x"), ("m",), advances=True),
        Step("d", "d", "backward", ("m",), ("d",)),
    ]
    graph = graph_of(steps, {"x": 1, "state": 50, "m": 10, "d": 2}, ("x",), ("d",))
    assert simulate(graph, {}, explicit(graph, ("state", "m", "m", "d"))).held == (51, 61, 111, 13)


def test_the_simulator_agrees_with_the_timeline() -> None:
    """Edited random steps: the same bytes at every moment, and the same seconds."""
    for seed in range(60):
        graph, times = random_step(seed, 6)
        offers = Recompute().propose(graph, times)
        chosen = random.Random(seed).sample(offers, len(offers) // 2)
        edited = edit(graph, chosen)
        score = simulate(graph, times, check(graph, from_edited(graph, edited)), 1)
        assert score.held == timeline(edited), seed


@pytest.mark.parametrize(
    ("runs", "rule"),
    [
        ([*ONCE, "x"], "does not have"),
        (["a", "v", "b", "seed", "da"], "before any run"),
        (["a", "v", "seed", "b", "db", "db", "da"], "runs once"),
        (["a", "v", "b", "seed", "seed", "db", "da"], "runs once"),
        (["a", "v", "b", "seed", "db"], "should run next"),
    ],
)
def test_other_computations_are_refused(runs: list[str], rule: str) -> None:
    graph = small()
    with pytest.raises((ScheduleError, KeyError), match=rule if "x" not in runs else "x"):
        check(graph, explicit(graph, runs))


def changed(schedule: Schedule, at: int, run: Run) -> Schedule:
    return (*schedule[:at], run, *schedule[at + 1 :])


@pytest.mark.parametrize(
    ("at", "run", "rule"),
    [
        (4, Run("db", (3, 1, 3)), "does not make"),  # b taken from the seed
        (4, Run("db", (3, 1)), "names 2 reads"),
        (2, Run("b", (2,)), "not an earlier one"),
        (0, Run("a", (-2,)), "not an earlier one"),
        (2, Run("b", (-1,)), "does not make"),
        (2, Run("nobody", ()), "does not have"),
    ],
)
def test_wrong_reads_are_refused(at: int, run: Run, rule: str) -> None:
    graph = small()
    good = explicit(graph, ONCE)
    assert check(graph, good) == good
    with pytest.raises(ScheduleError, match=rule):
        check(graph, changed(good, at, run))


def test_what_was_overwritten_is_not_read_again() -> None:
    """An update in place, then a forward step run again from the old value."""
    steps = [
        Step("a", "a", "forward", ("w",), ("a",)),
        Step("up", "up", "backward", ("w", "a"), ("w2",), pure=False),
        Step("d", "d", "backward", ("a",), ("d",)),
    ]
    graph = graph_of(steps, {"w": 1, "a": 10, "d": 1}, ("w",), ("d",), {"w2": "w"})
    check(graph, explicit(graph, ("a", "up", "d")))
    with pytest.raises(ScheduleError, match="overwritten"):
        check(graph, explicit(graph, ("a", "up", "a", "d")))


def test_a_lost_output_is_refused() -> None:
    steps = [Step("l", "l", "forward", ("x",), ("l",)), Step("d", "d", "backward", ("x",), ("d",))]
    graph = graph_of(steps, {"x": 1, "l": 1, "d": 1}, ("x",), ("l", "d"))
    with pytest.raises(ScheduleError, match="output l"):
        check(graph, explicit(graph, ("d",)))


def test_pruning_drops_what_nobody_reads() -> None:
    graph = small()
    again = pruned(graph, explicit(graph, ("a", "v", "b", "seed", "a", "db", "da")))
    assert again == explicit(graph, ONCE)
