from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from memopt.errors import MemoptError
from memopt.runtime.trace import MARK, changes, record

MB = 1 << 20


def block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def test_three_blocks_one_freed_between() -> None:
    def run() -> None:
        first, second = block(MB), block(2 * MB)
        del first
        third = block(4 * MB)
        del second, third

    assert record(run).levels == (MB, 3 * MB, 2 * MB, 6 * MB, 4 * MB, 0)


def test_views_and_in_place_ops_take_nothing() -> None:
    def run() -> None:
        whole = block(MB)
        whole.view(2, -1)[0].zero_().t()

    assert record(run).peak() == MB


def test_ends_of_earlier_blocks_are_not_counted() -> None:
    before = [block(MB)]

    def run() -> None:
        before.clear()
        block(2 * MB)

    assert record(run).levels == (2 * MB, 0)


def test_a_stale_size_of_an_earlier_recording_is_not_believed() -> None:
    """The allocator remembers a block profiled once and freed unseen; its address may serve another block later."""
    stale, fresh = 64, 128  # addresses
    blocks = [(1, stale, -500), (2, fresh, 300), (3, stale, 700), (4, fresh, -300), (5, stale, -500)]
    assert list(changes(blocks)) == [(2, 300), (3, 700), (4, -300), (5, -700)]


def test_garbage_collection_inside_is_seen() -> None:
    def run() -> None:
        knot: list[object] = [block(MB)]
        knot.append(knot)
        del knot
        gc.collect()

    assert record(run).levels == (MB, 0)


def test_ranges_cut_the_trace() -> None:
    def run() -> None:
        first = block(MB)
        with record_function(MARK + "late"):
            second = block(2 * MB)
            del second
        del first

    trace = record(run)
    (late,) = trace.named("late")
    assert trace.level_at(late.start) == MB
    assert trace.level_at(late.end) == MB
    assert trace.peak(late.start, late.end) == 3 * MB
    assert trace.peak(end=late.start) == MB
    assert trace.named("none") == ()


def test_backward_runs_where_it_is_seen() -> None:
    leaf = torch.zeros(MB // 4, requires_grad=True)

    def run() -> None:
        leaf.sum().backward()
        leaf.grad = None

    trace = record(run)
    assert trace.peak() >= MB
    assert trace.levels[-1] == 0


def test_other_threads_are_not_seen() -> None:
    """The limit the module's docstring states; when torch lifts it, the docstring and this test change."""

    def run() -> None:
        thread = threading.Thread(target=lambda: block(MB))
        thread.start()
        thread.join()

    assert record(run).levels == ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own imports
def test_inductor_code_is_seen() -> None:
    compiled = torch.compile(lambda x: x.exp() + 1, backend="inductor")
    x = torch.randn(64, 4096)
    compiled(x)
    trace = record(lambda: compiled(x))
    assert trace.levels == (x.nbytes, 0)  # one fused kernel: its output alone


def test_events_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own reading of them, an object each, took most of the time of a measurement."""
    monkeypatch.setattr(torch.autograd.profiler.profile, "_parse_kineto_results", None)
    assert record(lambda: block(8)).peak() == 8


def test_an_active_profiler_is_refused_and_left_alone() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as outer:
        with pytest.raises(MemoptError, match="already running"):
            record(lambda: block(8))
        torch.ones(3).add(1)
    assert any(event.name == "aten::add" for event in outer.events())
