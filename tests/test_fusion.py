"""The fused photograph: temporaries inside a window vanish, and a plan on it becomes remakes of the real steps."""

from __future__ import annotations

from memopt.edit import Remake, edit
from memopt.fusion import expanded, fused, fused_seconds, unfused
from memopt.graph import Step, StepGraph, Storage, TensorInfo, verify
from memopt.timeline import peak, timeline

MB = 2**20


def step(name: str, phase: str, reads: str, writes: str = "", fusable: bool = True) -> Step:
    made = tuple((writes or name).split())
    return Step(name, f"aten.{name}", phase, tuple(reads.split()), made, fusable=fusable)  # type: ignore[arg-type]


def softmax_step() -> StepGraph:
    """mm -> (amax, sub, exp, sum) -> loss; the backward reads sub, then a product reads what is made of it."""
    steps = (
        step("mm", "forward", "w", fusable=False),
        step("amax", "forward", "mm"),
        step("sub", "forward", "mm amax"),
        step("exp", "forward", "sub"),
        step("sum", "forward", "exp"),
        step("grad", "backward", "sub sum"),
        step("weight", "backward", "grad w", fusable=False),
    )
    small = {"amax", "sum"}
    names = ["w", *(name for s in steps for name in s.writes)]
    storages = {name: Storage(name, 64 if name in small else MB) for name in names}
    tensors = {name: TensorInfo(name, (1,), "float32", name) for name in names}
    return StepGraph(("w",), steps, ("weight",), tensors, storages)


def test_a_window_becomes_one_step_that_writes_what_is_read_outside() -> None:
    found = fused(softmax_step())
    verify(found.graph)
    assert [s.name for s in found.graph.steps] == ["mm", "sum", "grad", "weight"]
    window = found.graph.steps[1]
    assert (window.reads, window.writes, window.fused) == (("mm",), ("sub", "sum"), True)


def test_temporaries_of_a_window_hold_nothing_and_outputs_take_the_place_of_inputs() -> None:
    graph = softmax_step()
    assert max(timeline(graph)[:5]) == 3 * MB + 64  # w, mm, amax, sub
    assert max(timeline(fused(graph).graph)[:2]) == 2 * MB  # w and mm; then sub in the place of mm


def test_remaking_a_windows_output_remakes_what_is_inside_it_and_keeps_what_is_read_elsewhere() -> None:
    graph = softmax_step()
    found = fused(graph)
    window = found.graph.steps[1]
    chosen = expanded(found, [Remake("recompute", "sub", ("grad", "weight"), (window,))])
    assert sorted(r.value for r in chosen) == ["amax", "sub"]
    after = edit(graph, chosen)
    assert [s.name for s in after.steps] == ["mm", "amax", "sub", "exp", "sum", "amax__1", "sub__1", "grad", "weight"]
    assert peak(edit(found.graph, [Remake("recompute", "sub", ("grad", "weight"), (window,))])) <= peak(after)


def test_an_output_nobody_reads_after_the_edit_is_not_made() -> None:
    found = fused(softmax_step())
    window = found.graph.steps[1]
    after = edit(found.graph, [Remake("recompute", "sub", ("grad", "weight"), (window,))])
    assert timeline(after)[1] == 2 * MB  # w and mm: sub is made again later, so the forward does not store it


def test_seconds_shrink_with_the_bytes_that_still_move() -> None:
    graph = softmax_step()
    seconds = dict.fromkeys((s.name for s in graph.steps), 1.0)
    priced = fused_seconds(fused(graph), seconds)
    assert priced["mm"] == 1.0
    assert 0 < priced["sum"] < 4.0
    assert fused_seconds(unfused(graph), seconds) == seconds
