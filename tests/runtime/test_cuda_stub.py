"""The bookkeeping around CUDA's allocator, on a stand-in for it: what runs on a device is in tests/gpu."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from memopt.runtime import opcost
from memopt.runtime.guard import Guard
from memopt.runtime.libraries import kept_by_libraries
from memopt.runtime.phases import cuda_peaks, phase

CUDA = torch.device("cuda")


class Allocator:
    """held: bytes allocated now. waits: how often somebody waited for the device."""

    def __init__(self) -> None:
        self.held = self.peak = self.waits = 0

    def take(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def passing(self, size: int) -> None:
        """Bytes that are given back at once."""
        self.take(size)
        self.held -= size

    def reset(self, _: torch.device) -> None:
        self.peak = self.held

    def wait(self, _: torch.device) -> None:
        self.waits += 1


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    made = Allocator()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: made.peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 2 * made.peak)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: made.held)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", made.reset)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    return made


def test_phases_have_peaks_of_their_own(allocator: Allocator) -> None:
    with cuda_peaks(CUDA) as peaks:
        with phase("forward"):
            allocator.passing(5)
            allocator.take(3)
        with phase("backward"):
            allocator.passing(1)
    assert peaks.phases == {"forward": 5, "backward": 4}
    assert (peaks.peak, peaks.reserved) == (5, 10)


def test_a_guard_and_a_measurement_do_not_hide_peaks_from_each_other(allocator: Allocator) -> None:
    """Both reset the same counters: the guard in the middle of phases, the phases in the middle of a guarded step."""
    guard = Guard(9, device="cuda")
    guard.begin_step()
    with cuda_peaks(CUDA) as peaks:
        with phase("forward"):
            allocator.passing(7)
            guard.begin_step()
            allocator.passing(5)
        with phase("optimizer"):
            allocator.passing(4)
            guard.end_step()
    assert guard.measured is not None
    assert guard.measured.peak_bytes == 5
    assert peaks.phases == {"forward": 7, "optimizer": 4}
    assert peaks.peak == 7


def test_what_compiling_takes_in_the_first_step_is_nobodys_peak(allocator: Allocator) -> None:
    """Else a budget would be planned again for kernels that were tuned once."""
    guard = Guard(9, device="cuda")
    guard.begin_step()
    allocator.passing(100)
    guard.begin_step()
    assert guard.measured is None
    allocator.passing(6)
    guard.end_step()
    assert guard.measured is not None
    assert guard.measured.peak_bytes == 6


def test_only_few_steps_wait_for_the_device(allocator: Allocator) -> None:
    guard = Guard(9, device="cuda")
    for _ in range(7):
        guard.begin_step()
    guard.end_step()
    assert allocator.waits == 4  # before and after the second and the fourth
    assert guard.measured is not None
    assert guard.measured.seconds > 0


def test_a_workspace_is_seen_within_a_watched_step(allocator: Allocator) -> None:
    allocator.take(10)
    with cuda_peaks(CUDA) as peaks:
        found, _ = opcost._peak_cuda(lambda: allocator.passing(4), CUDA)
        assert found == 4
        allocator.passing(1)
    assert peaks.peak == 14


def test_large_operations_are_tried_where_the_device_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 << 30, 80 << 30))
    assert opcost.OpCosts("cuda", cache=None).byte_limit == 32 << 30
    assert opcost.OpCosts("cpu", cache=None).byte_limit == 1 << 30


def test_runs_on_cuda_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device's clock, in seconds a run."""
    ran: list[int] = []
    event = SimpleNamespace(record=lambda _: None, synchronize=lambda: None, elapsed_time=lambda _: 4.0 * len(ran))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    assert opcost._burst(lambda: ran.append(1), CUDA) == pytest.approx(4e-3)


def test_the_cpu_has_no_library_workspaces() -> None:
    assert kept_by_libraries(torch.device("cpu")) == 0


def test_library_workspaces_are_in_the_plan_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak() -> int:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters())
        memopt.compile(model, "1GB", optimizer=optimizer, example_inputs=(torch.ones(4, 8),), lowering="eager")
        handle: Any = model.memopt
        return int(handle.plan.peak)

    plain = peak()
    monkeypatch.setattr("memopt.profiling.kept_by_libraries", lambda _: 32 << 20)
    assert peak() == plain + (32 << 20)
