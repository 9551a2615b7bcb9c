"""Names of copies lead back to the steps they were made of, and their seconds are counted."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from memopt.edit import Remake, edit
from memopt.graph import Step, StepGraph, Storage, TensorInfo
from memopt.plans import Problem, added_seconds, original
from memopt.solvers.blocks import find_blocks
from tests.synthetic import llama


@pytest.mark.parametrize(
    ("step", "want"),
    [
        ("mm_3", "mm_3"),
        ("mm_3__2", "mm_3"),
        ("__and__", "__and__"),
        ("__and____12", "__and__"),
        ("_to_copy_4__1", "_to_copy_4"),
    ],
)
def test_original_takes_off_the_copy_number_alone(step: str, want: str) -> None:
    assert original(step) == want


def test_a_step_that_looks_like_a_copy_keeps_its_own_seconds() -> None:
    names = ("x", "a", "b", "c")
    steps = (
        Step("__and___1", "aten.__and__", "forward", ("x",), ("a",)),
        Step("use", "aten.exp", "forward", ("a",), ("b",)),
        Step("late", "aten.add", "backward", ("a", "b"), ("c",)),
    )
    tensors = {name: TensorInfo(name, (1,), "float32", name) for name in names}
    graph = StepGraph(("x",), steps, ("c",), tensors, {name: Storage(name, 4) for name in names})
    again = Remake("recompute", "a", ("late", "late"), unpack=(steps[0],))
    problem = Problem(graph, (again,), 100, {"__and___1": 3.0, "use": 1.0, "late": 1.0})
    assert added_seconds(problem, graph) == 0.0
    assert added_seconds(problem, edit(graph, (again,))) == 3.0


def test_what_follows_from_a_graph_alone_is_found_once_and_belongs_to_that_graph() -> None:
    graph, _ = llama(2)
    longer, _ = llama(3)
    blocks = find_blocks(graph)
    assert find_blocks(graph) is blocks
    assert len(find_blocks(longer).starts) > len(blocks.starts)
    assert replace(graph) == graph
    assert find_blocks(replace(graph)) is not blocks
    assert find_blocks(replace(graph)) == blocks
    assert pickle.loads(pickle.dumps(graph)) == graph
