"""The fused photograph: temporaries inside a window vanish, and a plan on it becomes remakes of the real steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memopt.edit import Remake, edit
from memopt.fusion import expanded, fused, fused_seconds, kernels, leaving, unfused
from memopt.graph import Step, StepGraph, Storage, TensorInfo, verify
from memopt.passes.packing import packed
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


def test_what_a_fused_step_unpacks_for_itself_is_never_held_and_parts_no_kernel() -> None:
    found = fused(softmax_step())
    sub = {codec: packed(found.graph, "", "sub", (codec, 64)) for codec in ("int8", "rows")}
    remakes = {codec: replace(remake, span=("grad", "weight")) for codec, remake in sub.items()}
    inlined, stored = (edit(found.graph, [remakes[codec]]) for codec in ("int8", "rows"))
    grad = inlined.position["grad"]
    assert timeline(inlined)[grad] == MB + 64 + 64  # w, sum, and the packed bytes, held until they are read
    assert timeline(stored)[grad] == 2 * MB + 64
    called = replace(found.graph, steps=tuple(replace(s, fused=False) for s in found.graph.steps))
    assert timeline(edit(called, [remakes["int8"]]))[grad] == timeline(edit(called, [remakes["rows"]]))[grad]
    for codec, names in (("int8", 1), ("rows", 2)):
        kernel = kernels(found, edit(softmax_step(), expanded(found, [remakes[codec]])))
        assert len({kernel[name] for name in ("amax", "sub", "exp", "sum")}) == names


def test_seconds_shrink_with_the_bytes_that_still_move() -> None:
    graph = softmax_step()
    seconds = dict.fromkeys((s.name for s in graph.steps), 1.0)
    priced = fused_seconds(fused(graph), seconds)
    assert priced["mm"] == 1.0
    assert 0 < priced["sum"] < 4.0
    assert fused_seconds(unfused(graph), seconds) == seconds


def graph_of(steps: tuple[Step, ...], views: dict[str, str]) -> StepGraph:
    """Storages of a megabyte each; views: tensor -> the tensor whose storage it shares."""
    names = ["w", *(name for s in steps for name in s.writes)]
    storages = {name: Storage(name, MB) for name in names if name not in views}
    tensors = {name: TensorInfo(name, (1,), "float32", views.get(name, name)) for name in names}
    return StepGraph(("w",), steps, (steps[-1].writes[0],), tensors, storages)


def test_a_view_of_an_older_value_stays_out_of_the_kernel_it_feeds() -> None:
    steps = (
        step("old", "forward", "w", fusable=False),
        step("new", "forward", "w", fusable=False),
        step("view", "forward", "old", fusable=False),
        step("add", "forward", "new view"),
        step("exp", "forward", "add"),
        step("back", "backward", "view exp", fusable=False),
    )
    found = fused(graph_of(steps, {"view": "old"}))
    assert [s.name for s in found.graph.steps] == ["old", "new", "view", "exp", "back"]
    remade = Remake("recompute", "old", ("back", "back"), (steps[0],))
    after = edit(found.graph, [remade])  # the view is copied, the kernel that also reads it is not
    assert [s.name for s in after.steps] == ["old", "new", "view", "exp", "old__1", "view__1", "back"]


def looked_at() -> StepGraph:
    """A kernel makes y, which products read as a view of a view, in the backward too; what sums reads it as it is."""
    return graph_of(
        (
            step("x", "forward", "w", fusable=False),
            step("y", "forward", "x"),
            step("folded", "forward", "y", fusable=False),
            step("turned", "forward", "folded", fusable=False),
            step("inside", "forward", "folded"),
            step("sum", "forward", "inside"),
            step("loss", "forward", "turned sum", fusable=False),
            step("first", "backward", "loss turned", fusable=False),
            step("last", "backward", "first y", fusable=False),
        ),
        {"folded": "y", "turned": "y"},
    )


def test_views_that_are_read_outside_of_a_kernel_stand_behind_it() -> None:
    found = fused(looked_at())
    verify(found.graph)
    assert [s.name for s in found.graph.steps] == ["x", "sum", "folded", "turned", "loss", "first", "last"]
    assert found.graph.steps[1].writes == ("y", "sum")
    assert [s.name for s in found.members["sum"]] == ["y", "inside", "sum"]


def test_who_reads_a_view_of_what_was_packed_gets_one_of_what_is_unpacked() -> None:
    """And not of what a second run of the kernel makes: on paper its seconds and bytes were the plan's."""
    found = fused(looked_at())
    remake = replace(packed(found.graph, "", "y", ("rows", 64)), span=("first", "last"))
    after = edit(found.graph, [remake])
    verify(after)
    names = [s.name for s in after.steps]
    assert names[names.index("loss") + 1 :] == ["y_from_rows__1", "folded__1", "turned__1", "first", "last"]
    (first, last) = (after.steps[after.position[name]] for name in ("first", "last"))
    assert (first.reads, last.reads) == (("loss", "turned__1"), ("first", "y_from_rows__1"))
    in_steps = edit(looked_at(), expanded(found, [remake]))
    assert [s.name for s in in_steps.steps[-5:]] == names[-5:]


def test_a_kernel_whose_value_is_read_as_a_view_is_run_again_for_the_view() -> None:
    found = fused(looked_at())
    kernel = found.graph.steps[1]
    after = edit(found.graph, [Remake("recompute", "y", ("first", "last"), (kernel,))])
    assert [s.name for s in after.steps[-5:]] == ["sum__1", "folded__1", "turned__1", "first", "last"]


def siblings(late: str) -> StepGraph:
    """One kernel makes y and z of x, z by way of y; `late` is what the last backward step reads."""
    return graph_of(
        (
            step("x", "forward", "w", fusable=False),
            step("y", "forward", "x"),
            step("z", "forward", "y"),
            step("loss", "forward", "z", fusable=False),
            step("first", "backward", "loss z", fusable=False),
            step("last", "backward", f"first {late}", fusable=False),
        ),
        {},
    )


def test_a_sibling_a_value_is_made_of_is_remade_with_it_unless_the_plan_still_holds_it() -> None:
    for late, wanted in (("x", ["y", "z"]), ("y", ["z"])):
        graph = siblings(late)
        found = fused(replace(graph, outputs=("last", "y") if late == "y" else ("last",)))
        (window,) = found.members
        remade = Remake("recompute", "z", ("first", "first"), (found.graph.steps[found.graph.position[window]],))
        assert sorted(r.value for r in expanded(found, [remade])) == wanted


def test_copies_are_kernels_of_their_own_and_store_what_others_read() -> None:
    graph = softmax_step()
    found = fused(graph)
    window = found.graph.steps[1]
    after = edit(graph, expanded(found, [Remake("recompute", "sub", ("grad", "weight"), (window,))]))
    kernel = kernels(found, after)
    assert {kernel[name] for name in ("amax", "sub", "exp", "sum")} == {kernel["sum"]}
    assert kernel["amax__1"] == kernel["sub__1"] not in (kernel["sum"], kernel["grad"])
    assert "mm" not in kernel
    assert leaving(after, kernel) == {"sum", "sub__1", "grad"}


def scattered(late: str = "") -> StepGraph:
    """Gradients of an embedding: rows put into zeros, made early. late: what else reads the zeros."""
    steps = (
        step("zeros", "backward", ""),
        step("mm", "backward", "w", fusable=False),
        replace(step("put", "backward", "zeros mm", fusable=False), op="aten.index_put.default"),
        step("weight", "backward", f"put {late}".strip(), fusable=False),
    )
    names = ["w", *(name for s in steps for name in s.writes)]
    storages = {name: Storage(name, MB) for name in names}
    tensors = {name: TensorInfo(name, (1,), "float32", name) for name in names}
    return StepGraph(("w",), steps, ("weight",), tensors, storages)


def test_a_scatter_writes_into_the_fill_that_nobody_else_reads() -> None:
    found = fused(scattered())
    verify(found.graph)
    assert [s.name for s in found.graph.steps] == ["mm", "put", "weight"]
    assert (found.graph.steps[1].reads, found.graph.steps[1].writes) == (("mm",), ("put",))
    assert timeline(scattered())[2] == 4 * MB  # w, mm, zeros, put
    assert timeline(found.graph)[1] == 3 * MB
    again = expanded(found, [Remake("recompute", "put", ("weight", "weight"), (found.graph.steps[1],))])
    assert sorted(r.value for r in again) == ["put", "zeros"]


def test_a_fill_that_is_read_again_or_given_away_stays_beside_the_scatter() -> None:
    names = ["zeros", "mm", "put", "weight"]
    assert [s.name for s in fused(scattered(late="zeros")).graph.steps] == names
    assert [s.name for s in fused(replace(scattered(), outputs=("zeros", "weight"))).graph.steps] == names


def test_views_behind_a_kernel_whatever_they_look_like() -> None:
    """Several at once; one that the caller holds; of views alone there is nothing to fuse."""
    steps = (
        step("x", "forward", "w", fusable=False),
        step("y", "forward", "x"),
        step("split", "forward", "y", "left right", fusable=False),
        step("half", "forward", "left"),
        step("flat", "forward", "half", fusable=False),
        step("last", "forward", "half right", fusable=False),
        step("out", "backward", "last", fusable=False),
    )
    graph = replace(graph_of(steps, {"left": "y", "right": "y", "flat": "half"}), outputs=("out", "flat"))
    found = fused(graph)
    verify(found.graph)
    assert [s.name for s in found.graph.steps] == ["x", "half", "split", "flat", "last", "out"]
    assert found.graph.steps[1].writes == ("y", "half")
    assert found.lifted == {"split", "flat"}
    looks = tuple(replace(s, fusable=True) for s in steps if s.name in found.lifted)
    alone = replace(graph, inputs=("w", "y", "half"), steps=looks, outputs=("left", "flat"))
    assert fused(alone).graph.steps == looks


@pytest.mark.parametrize("span", [("look", "mm2"), ("mm", "mm2")])
def test_a_span_that_begins_at_a_view_behind_a_kernel_parts_no_kernel(span: tuple[str, str]) -> None:
    """In the step itself the view stands in the middle of the kernel."""
    steps = (
        step("x", "forward", "w", fusable=False),
        step("loss", "forward", "x", fusable=False),
        step("g", "backward", "loss"),
        step("look", "backward", "g", fusable=False),
        step("tail", "backward", "g x"),
        step("mm", "backward", "look tail", fusable=False),
        step("mm2", "backward", "mm x", fusable=False),
    )
    graph = graph_of(steps, {"look": "g"})
    found = fused(graph)
    remake = Remake("recompute", "x", span, (graph.steps[0],))
    kept = {"g", "tail", "look"}
    planned, real = (
        [s.name for s in g.steps] for g in (edit(found.graph, [remake]), edit(graph, expanded(found, [remake])))
    )
    assert [n for n in planned if n not in kept] == [n for n in real if n not in kept]
    assert real.index("tail") - real.index("g") == 2  # nothing was put between
