"""What counts as a training step: what the guard measures, which plan is shown; nothing measured stops a run."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.runtime.trace import profiler_is_active


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(32, 256), nn.Linear(256, 1)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.fall(self.rise(x).relu().sin()).square().mean()
        return loss


def compiled(budget: int | str = "1GB") -> tuple[Any, torch.optim.Optimizer]:
    torch._dynamo.reset()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    return memopt.compile(model, budget, optimizer=optimizer, lowering="eager"), optimizer


def train(model: Any, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "memopt"]


def test_what_comes_after_the_update_is_not_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    """Validation on a larger batch took a step over its budget, was planned for, and then refused."""
    model, optimizer = compiled()
    train(model, optimizer, torch.randn(256, 32), 1)
    budget = model.memopt.plan.peak + 50_000
    model, optimizer = compiled(budget)
    with caplog.at_level(logging.WARNING, logger="memopt"):
        for _ in range(3):
            train(model, optimizer, torch.randn(256, 32), 1)
            with torch.no_grad():
                model(torch.randn(256 * 64, 32))
    assert said(caplog) == []
    assert model.memopt.measured.peak_bytes <= budget


def test_the_profiler_ends_with_the_update() -> None:
    model, optimizer = compiled()
    train(model, optimizer, torch.randn(256, 32), 2)  # the second is watched
    assert not profiler_is_active()
    assert model.memopt.measured is not None


def test_two_forwards_before_a_backward_are_one_step_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = compiled()
    x = torch.randn(4096, 32)
    train(model, optimizer, x, 1)
    with caplog.at_level(logging.WARNING, logger="memopt"):
        for _ in range(3):
            (model(x) + model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum("forward again before the backward" in line for line in said(caplog)) == 1
    assert model.memopt.measured.peak_bytes > 1.2 * model.memopt.plan.peak  # both forwards' activations


def test_a_forward_thrown_away_does_not_join_the_next_step(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = compiled()
    with caplog.at_level(logging.WARNING, logger="memopt"):
        for _ in range(4):
            model(torch.randn(256, 32))  # no backward, not kept
            train(model, optimizer, torch.randn(256, 32), 1)
    assert said(caplog) == []


def test_back_at_an_earlier_shape_its_plan_is_shown_and_watched(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = compiled()
    large, small = torch.randn(8192, 32), torch.randn(64, 32)
    with caplog.at_level(logging.WARNING, logger="memopt"):
        train(model, optimizer, large, 1)
        planned = model.memopt.plan.peak
        train(model, optimizer, small, 2)
        assert model.memopt.plan.peak < planned
        train(model, optimizer, large, 3)
    assert model.memopt.plan.peak == planned
    assert model.memopt.measured.peak_bytes == planned
    assert said(caplog) == []


def test_updates_inside_the_backward_do_not_end_the_step() -> None:
    """The recipe of torch's tutorial: an optimizer for each parameter, stepped by a hook of its gradient."""
    torch._dynamo.reset()
    model = memopt.compile(Net(), "1GB", lowering="eager")
    optimizers, watched = {p: torch.optim.SGD([p]) for p in model.parameters()}, []

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()
        watched.append(model.memopt._session.watch.watching is not None)

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)
    for _ in range(3):
        model(torch.randn(256, 32)).backward()
    assert watched == [True] * 12
    assert model.memopt.measured is not None


def test_no_other_models_capture_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that stopped training while it was watched had all that another one's planning runs recorded."""
    model, _ = compiled()
    for _ in range(2):
        model(torch.randn(256, 32)).backward()
    assert profiler_is_active()
    tracing: list[bool] = []
    lower = memopt.capture.lower
    monkeypatch.setattr(
        memopt.capture, "lower", lambda *a, **k: (tracing.append(profiler_is_active()), lower(*a, **k))[1]
    )
    memopt.plan(Net(), (torch.randn(256, 32),), budget="1GB", lowering="eager")
    assert tracing
    assert not any(tracing)


def test_a_step_over_budget_that_no_plan_holds_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """What already trains is never ended by a refusal."""
    model, optimizer = compiled()
    x = torch.randn(256, 32)
    train(model, optimizer, x, 1)
    model, optimizer = compiled(model.memopt.plan.peak)
    held = []
    model.rise.weight.register_post_accumulate_grad_hook(lambda _: held.append(torch.empty(10_000_000)))
    with caplog.at_level(logging.WARNING, logger="memopt"):
        train(model, optimizer, x, 4)
    assert any("no plan takes that much less" in line for line in said(caplog))


class Repeated(nn.Module):
    """One block run as often as asked; a break in it makes it a graph of its own, which the plans share."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(64, 64)

    def turn(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.block(x).sin().exp().cos()

    def forward(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = self.turn(x)
        return self.loss(x)

    def loss(self, x: Tensor) -> Tensor:
        """A function of its own, as Dynamo leaves a frame with a loop that breaks to Python."""
        return x.square().mean()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("unadvised")
def test_plans_that_share_a_graph_each_run_their_own() -> None:
    torch._dynamo.reset()
    x = torch.randn(512, 64)
    free = memopt.plan(Repeated(), (x, 6), budget="1GB", lowering="eager").peak
    with pytest.raises(memopt.BudgetError) as refused:
        memopt.plan(Repeated(), (x, 6), budget=1, lowering="eager")
    budget = (free + refused.value.floor_bytes) // 2
    model: Any = Repeated()
    optimizer = torch.optim.AdamW(model.parameters())
    memopt.compile(model, budget, optimizer=optimizer, lowering="eager")
    for times in (1, 6, 6, 6):  # the second by a plan is watched, the third has its figure
        model(x, times).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.memopt.measured.peak_bytes <= budget
    assert model.memopt.measured.peak_bytes == model.memopt.plan.peak


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_planning_often_finds_the_same_graphs() -> None:
    """Dynamo counts what it compiled function by function, and runs the function untraced at its limit."""
    torch._dynamo.reset()
    found = {memopt.plan(Repeated(), (torch.randn(8, 64), 2), budget="1GB", lowering="eager").breaks for _ in range(20)}
    assert len(found) == 1


def test_a_process_that_ends_within_a_watched_step_ends_well() -> None:
    """It ended in a segmentation fault: the guard's profiler was still recording."""
    code = (
        "import torch, memopt\n"
        "model = memopt.compile(torch.nn.Linear(4, 4), '1GB', lowering='eager')\n"
        "for _ in range(2): model(torch.randn(2, 4)).sum().backward()\n"
        "assert torch.autograd._profiler_enabled()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
