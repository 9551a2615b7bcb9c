from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from memopt.runtime.guard import Guard, thinned, tolerated
from memopt.runtime.trace import make_way, profiler_is_active

MB = 2**20


def block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "memopt"]


def test_steps_watched_thin_out() -> None:
    assert [step for step in range(1, 70) if thinned(step)] == [2, 4, 8, 16, 32, 64]


def test_it_measures_the_second_step_and_is_silent_within_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    held = block(MB)
    guard = Guard(9 * MB, resident=lambda: [held])
    for _ in range(3):
        guard.begin_step()
        block(8 * MB)
    guard.end_step()
    assert guard.measured is not None
    assert guard.measured.peak_bytes == 9 * MB
    assert guard.measured.profiled
    assert guard.steps == 3
    assert warnings(caplog) == []


def test_it_speaks_once_with_figures(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(4 * MB)
    for _ in range(5):
        guard.begin_step()
        block(8 * MB)
    guard.end_step()
    (said,) = warnings(caplog)
    assert "step 2 peaked at 8.0 MiB, 4.0 MiB (100.0 %) over the 4.0 MiB planned" in said


def test_what_is_tolerated_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    for size, said in ((tolerated(100 * MB), 0), (tolerated(100 * MB) + 1, 1)):
        with Guard(100 * MB) as guard:
            for _ in range(2):
                guard.begin_step()
                block(size)
        assert len(warnings(caplog)) == said


def test_a_guard_that_nobody_holds_records_no_longer() -> None:
    """A model that is let go of between its backward and its update would have all that follows recorded."""
    guard = Guard(9 * MB)
    guard.begin_step()
    guard.begin_step()
    assert profiler_is_active()
    del guard
    assert not profiler_is_active()


def test_no_recording_ends_inside_a_backward() -> None:
    """A profiler stopped there corrupts torch's heap, and where garbage is collected is nobody's choice."""
    guard, seen = Guard(9 * MB), []
    guard.begin_step()
    guard.begin_step()
    x = torch.ones(2, requires_grad=True)

    def collected(_: Tensor) -> None:
        nonlocal guard
        guard.end_step()
        guard.begin_step()
        del guard
        gc.collect()
        seen.append(profiler_is_active() and not make_way())

    y = x * 2
    y.register_hook(collected)
    y.sum().backward()
    assert seen == [True]
    gc.collect()
    assert not profiler_is_active()


def test_what_was_recorded_of_a_step_is_let_go_of_with_it() -> None:
    guard = Guard(9 * MB)
    guard.begin_step()
    guard.begin_step()
    recording = weakref.ref(guard._recording)  # type: ignore[type-var]
    guard.end_step()
    assert recording() is None


def test_a_guard_left_watching_makes_way_for_another() -> None:
    left, guard = Guard(9 * MB), Guard(9 * MB)
    for _ in range(2):
        left.begin_step()  # its model takes no further step: nobody ends what it watches
    for _ in range(3):
        guard.begin_step()
        block(8 * MB)
    assert guard.measured is not None
    assert guard.measured.peak_bytes == 8 * MB
    left.begin_step()
    assert left.measured is None


def test_the_first_step_is_not_watched() -> None:
    with Guard(MB) as guard:
        guard.begin_step()
        assert not torch.autograd._profiler_enabled()
    assert guard.measured is None


def test_the_users_profiler_comes_first(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(MB)
    guard.begin_step()
    with profile(activities=[ProfilerActivity.CPU]) as mine:
        guard.begin_step()
        block(8 * MB)
        guard.end_step()
        torch.ones(3).add(1)
    assert any(event.name == "aten::add" for event in mine.events())
    assert guard.measured is None
    assert warnings(caplog) == []


def test_a_profiler_the_user_starts_meanwhile_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(MB)
    guard.begin_step()
    guard.begin_step()
    block(8 * MB)
    with profile(activities=[ProfilerActivity.CPU]) as mine:
        guard.begin_step()  # ends the watched step while the user's profiler runs
        torch.ones(3).add(1)
    assert any(event.name == "aten::add" for event in mine.events())
    assert guard.measured is None
    guard.begin_step()  # the fourth
    block(8 * MB)
    guard.end_step()
    assert guard.measured is not None
    assert guard.measured.peak_bytes == 8 * MB
    assert len(warnings(caplog)) == 1
