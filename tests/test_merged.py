"""Regions on the photograph: a place that held only with another region falls with it; updates stand behind."""

from __future__ import annotations

from memopt.graph import Step, StepGraph, Storage, TensorInfo
from memopt.merged import Region, merged, standing


def graph(*steps: tuple[str, tuple[str, ...]]) -> StepGraph:
    """(name, what it reads) of steps that each make a tensor of their name; x is given."""
    made = tuple(Step(name, "aten.mul.Tensor", "backward", reads, (name,)) for name, reads in steps)
    names = ("x", *(name for name, _ in steps))
    tensors = {name: TensorInfo(name, (4,), "float32", name, (1,)) for name in names}
    storages = {name: Storage(name, 16, "temporary") for name in names}
    return StepGraph(("x",), made, (names[-1],), tensors, storages)


def region(step: str, steps: tuple[str, ...], reads: tuple[str, ...], writes: tuple[str, ...]) -> Region:
    return Region(step, steps[-1], False, steps, (), reads, writes, (), step, 0, 100, 50)


STEPS = graph(("b1", ("x",)), ("a1", ("b1",)), ("b2", ("x",)), ("a2", ("a1", "b2")))
A = region("A", ("a1", "a2"), ("b1", "b2"), ("a2",))
B = region("B", ("b1", "b2"), ("x",), ("b1", "b2"))  # stands behind a1, which reads it: in A, which stands behind


def test_a_region_stands_with_the_one_it_was_placed_by() -> None:
    assert standing(STEPS, [A, B]) == [A, B]
    assert [step.name for step in merged(STEPS, [A, B]).steps] == ["B", "A"]


def test_and_falls_without_it() -> None:
    assert standing(STEPS, [B]) == []
    assert standing(STEPS, [A]) == [A]


def test_an_update_stands_behind_the_region_that_makes_its_gradient() -> None:
    whole = graph(("g", ("x",)), ("opt:w", ("g",)), ("y", ("x",)), ("z", ("y",)))
    one = region("R", ("g", "y"), ("x",), ("g", "y"))
    assert [step.name for step in merged(whole, [one]).steps] == ["R", "opt:w", "z"]
    assert standing(whole, [one]) == [one]
