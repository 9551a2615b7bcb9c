"""Gradients on disk from when they are final until the update: the same bits, clipped and accumulated as ever."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.coded import store_weights
from memopt.devices import device
from memopt.optim.portions import Update
from memopt.optim.stepper import Stepper
from memopt.overlap import MOVE
from memopt.planfile import save_plan
from memopt.refusal import Refused
from memopt.runtime import disk
from memopt.runtime.arena import place_of, places
from memopt.runtime.disk import DiskError
from memopt.runtime.measure import measure_step

WIDTH, DEPTH = 128, 3
ROOM = "200MB"
Optimizer = Any


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def batch(at: int = 0) -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(at))


OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-1),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


def made(budget: Any = None, name: str = "AdamW", **options: Any) -> tuple[Model, Optimizer]:
    """The model and its optimizer, compiled where there is a budget."""
    plain = model()
    optimizer = OPTIMIZERS[name](plain.parameters())
    if budget is not None:
        memopt.compile(plain, budget=budget, optimizer=optimizer, lowering="eager", numerics="exact", **options)
    return plain, optimizer


@cache
def floor(name: str = "AdamW", accumulate: int = 1, passes: str = "") -> int:
    """The least budget of a step with room on disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refused, "ways_out", lambda self: ())
        with pytest.raises(memopt.BudgetError) as refused:
            made(1, name, disk_budget=ROOM, accumulate=accumulate, passes=passes, example_inputs=(batch(),))
    assert refused.value.floor_bytes is not None
    return refused.value.floor_bytes


def trained(
    plain: nn.Module, optimizer: Optimizer, steps: int = 3, accumulate: int = 1, clip: float | None = 0.05,
    to_none: bool = True,
) -> list[float]:  # fmt: skip
    """Losses and norms of some steps."""
    told = []
    for at in range(steps):
        for part in range(accumulate):
            loss = plain(batch(10 * at + part)) / accumulate
            loss.backward()
            told.append(loss.item())
        if clip is not None:
            told.append(nn.utils.clip_grad_norm_(plain.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    return told


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def away(plain: nn.Module) -> list[str]:
    """Parameters whose gradients lie on disk now."""
    return [name for name, p in plain.named_parameters() if p.grad is not None and place_of(p.grad) is not None]


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "accumulate"),
    [
        *(("AdamW", 1), ("SGD", 3)),
        *(pytest.param(*case, marks=LONG) for case in (("AdamW", 3), ("SGD", 1), ("Adafactor", 1))),
    ],
)
def test_the_bits_of_plain_training_in_fewer_bytes_than_with_the_state_there_alone(name: str, accumulate: int) -> None:
    states, least = floor(name, accumulate, "-gradients_on_disk"), floor(name, accumulate)
    gradients = 2 * DEPTH * 4 * WIDTH * WIDTH * 4
    assert least < states - 0.5 * gradients
    mine, optimizer = made(least, name, disk_budget=ROOM, accumulate=accumulate)
    plain, theirs = made(None, name)
    assert trained(mine, optimizer, accumulate=accumulate) == trained(plain, theirs, accumulate=accumulate)
    assert same(mine, plain)
    (note,) = (note for note in mine.memopt.plan.notes if note.startswith("gradients of"))
    assert "lie on disk" in note
    assert "(exact)" in note
    if accumulate == 1:
        x = batch(99)
        found = measure_step(lambda: mine(x), optimizer, resident=[mine, x])
        assert found.peak_bytes == pytest.approx(mine.memopt.plan.peak, abs=16)
        assert found.peak_bytes <= least


def test_they_are_tensors_like_any_other_and_stay_the_same_ones() -> None:
    mine, optimizer = made(floor(), disk_budget=ROOM)
    plain, theirs = made()
    for each in (mine, plain):
        each(batch()).backward()
    assert len(away(mine)) == 2 * DEPTH
    first = {name: p.grad for name, p in mine.named_parameters()}
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert p.grad.stride() == q.grad.stride()
    optimizer.step()
    theirs.step()
    optimizer.zero_grad()
    mine(batch(1)).backward()
    assert all(dict(mine.named_parameters())[name].grad is first[name] for name in away(mine))


@pytest.mark.parametrize("to_none", [True, False])
def test_a_second_backward_and_a_loss_from_outside_are_added(to_none: bool) -> None:
    mine, optimizer = made(floor(), disk_budget=ROOM)
    plain, theirs = made()
    for at in range(3):
        for each, steps in ((mine, optimizer), (plain, theirs)):
            for part in range(2):
                each(batch(2 * at + part)).backward()
            sum(p.square().sum() for p in each.parameters()).backward()
            steps.step()
            steps.zero_grad(set_to_none=to_none)
    assert same(mine, plain)


@LONG
def test_no_more_go_there_than_must() -> None:
    least, states = floor(), floor(passes="-gradients_on_disk")
    mine, optimizer = made(states - 300_000, disk_budget=ROOM)
    assert least < states - 300_000
    mine(batch()).backward()
    assert 0 < len(away(mine)) < 2 * DEPTH
    optimizer.step()
    roomy, optimizer = made(states, disk_budget=ROOM)
    roomy(batch()).backward()
    assert not away(roomy)
    assert not any(note.startswith("gradients of") for note in roomy.memopt.plan.notes)


def test_hooks_are_run_or_refused() -> None:
    mine, optimizer = made(floor(), disk_budget=ROOM, example_inputs=(batch(),))
    weight = mine.layers[0].up.weight
    weight.register_hook(lambda g: g * 0)  # since it was planned, but before it is lowered
    mine(batch()).backward()
    assert not bool(weight.grad.any())
    assert place_of(weight.grad) is None
    optimizer.step()
    optimizer.zero_grad()
    mine.layers[1].up.weight.register_hook(lambda g: g * 0)
    with pytest.raises(memopt.MemoptError, match="a hook was registered on a parameter whose gradient the plan moves"):
        mine(batch()).backward()


def test_no_more_than_there_is_room_for() -> None:
    every = 2 * DEPTH * 4 * WIDTH * WIDTH * 4
    made(floor("SGD"), "SGD", disk_budget=every, example_inputs=(batch(),))
    with pytest.raises(memopt.BudgetError):
        made(floor("SGD"), "SGD", disk_budget=every - 1, example_inputs=(batch(),))


def test_a_parameter_whose_values_are_in_bytes_has_one_of_its_full_size(tmp_path: Path) -> None:
    mine, plain = model(), model()
    optimizer, theirs = (OPTIMIZERS["AdamW"](each.parameters()) for each in (mine, plain))
    store_weights(mine, optimizer)
    stepper, params = Stepper(optimizer), dict(mine.named_parameters())
    name = "layers.0.up.parametrizations.weight.original"
    stepper.follow(Update(gradients=frozenset({name}), pool=disk.use(tmp_path, 1 << 24).codec), params)
    move = stepper.mover(name, params[name])
    for at in range(3):
        for each in (mine, plain):
            each(batch(at)).backward()
        gradient, params[name].grad = params[name].grad, None
        for _ in range(2):
            move(gradient)
        assert away(mine) == [name]
        assert params[name].grad.is_contiguous()
        plain.layers[0].up.weight.grad.mul_(2)
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
        theirs.zero_grad()
    assert same(mine, plain)


@LONG
def test_a_saved_plan_moves_them_again(tmp_path: Path) -> None:
    least = floor()
    mine, optimizer = made(least, disk_budget=ROOM)
    wanted = trained(mine, optimizer)
    save_plan(mine.memopt.plan, tmp_path / "plan.json")
    again, optimizer = made(least, disk_budget=ROOM, plan_file=tmp_path / "plan.json")
    assert trained(again, optimizer) == wanted
    assert same(again, mine)


def test_a_full_disk_is_an_error_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, optimizer = made(floor(), disk_budget=ROOM)
    before, held = {key: value.clone() for key, value in mine.state_dict().items()}, set(places)
    real, calls = os.posix_fallocate, []

    def full(*args: int) -> None:
        calls.append(args)
        if len(calls) == 2:  # the first was for the gradients
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskError, match="for gradients or the optimizer's state"):
        mine(batch())
    assert len(calls) == 2
    assert set(places) <= held, "others' may end meanwhile"
    assert all(torch.equal(value, before[key]) for key, value in mine.state_dict().items())
    assert not optimizer.state
    plain, theirs = made()
    assert trained(mine, optimizer) == trained(plain, theirs)


def test_for_a_gpu_they_lie_in_the_hosts_memory() -> None:
    """Planned: several backwards an update, so that none can be consumed in the backward."""
    options: dict[str, Any] = {
        "device": "rtx4090", "lowering": "eager", "accumulate": 2, "optimizer": None, "host_budget": "1GB",
    }  # fmt: skip
    plain = model()
    options["optimizer"] = torch.optim.AdamW(plain.parameters())
    with pytest.raises(memopt.BudgetError) as refused:
        memopt.plan(plain, (batch(),), budget=1, **options)
    found = memopt.plan(plain, (batch(),), budget=refused.value.floor_bytes, **options)
    assert any(note.startswith("gradients of 6") and "in the host's memory" in note for note in found.notes)
    others = memopt.plan(plain, (batch(),), budget="1GB", **options)
    assert not any(note.startswith("gradients of") for note in others.notes)
    moves = [step for step in found.after.steps if step.op == MOVE]
    link = device("rtx4090")
    there_and_back = 4 * WIDTH * WIDTH * 4 * (1 / link.device_to_host + 1 / link.host_to_device)
    assert [found.seconds_of(step) for step in moves] == pytest.approx([there_and_back] * 6)
