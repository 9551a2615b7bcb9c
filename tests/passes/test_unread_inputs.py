"""Backwards that ask of their input only its shape: it dies in the forward, and the gradients are the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.capture import survey
from memopt.passes.unread_inputs import unread_inputs
from memopt.photograph import photograph
from memopt.program import saved_for_backward
from memopt.runtime.measure import measure_step
from tests.passes.test_packing import stepped


class Frozen(nn.Module):
    """A trained convolution, whose output only a frozen layer reads, and one that holds nothing."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 3, padding=1), middle.requires_grad_(False)
        self.last = nn.Conv2d(8, 2, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))).sum()


MIDDLES = [
    lambda: nn.Conv2d(8, 8, 3, padding=1),
    lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, stride=2),
    lambda: nn.ConvTranspose2d(8, 8, 2, stride=2),
    lambda: nn.BatchNorm2d(8).eval(),
]


def saved_bytes(model: nn.Module, x: Tensor, clean: bool) -> int:
    """What the backward reads of what the forward made."""
    program = survey(model, (x,), {}, lambda p: p).captures[0].program
    program = unread_inputs(program).program if clean else program
    graph = photograph(program)
    made = {graph.storage_of(program.name(n)) for n in saved_for_backward(program)[0]} - set(graph.input_storages)
    return sum(graph.storages[name].nbytes for name in made)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("middle", MIDDLES)
def test_nothing_of_a_frozen_layer_is_saved(middle: object, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model, x = Frozen(middle()), torch.randn(4, 3, 16, 16).to(memory_format=memory_format)  # type: ignore[operator]
    assert saved_bytes(model, x, False) > 0
    assert saved_bytes(model, x, True) == 0
    want = stepped(model, x)
    memopt.compile(model, "1GB", lowering="eager", numerics="exact")
    got = stepped(model, x)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_peaks_are_lower() -> None:
    """Planned and measured; what a convolution takes inside itself is no part of a plan that has room for all."""
    planned, measured = {}, {}
    for off in ("", "-unread_inputs"):
        model, x = Deep(), torch.randn(8, 8, 32, 32)
        optimizer = torch.optim.SGD([model.bias])
        memopt.compile(model, "1GB", optimizer=optimizer, lowering="eager", passes=off)
        measured[off] = measure_step(lambda: model(x), optimizer, resident=[model, x]).peak_bytes  # noqa: B023
        planned[off] = model.memopt.plan.peak
    assert planned[""] < 0.7 * planned["-unread_inputs"]
    assert measured[""] < 0.7 * measured["-unread_inputs"]


class Deep(nn.Module):
    """One trained bias before six frozen convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8, 1, 1))
        self.layers = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)]).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + self.bias).sum()


@pytest.mark.parametrize("change", ["trained", "training", "read"])
def test_what_is_read_stays(change: str) -> None:
    model = Frozen(nn.BatchNorm2d(8) if change == "training" else nn.Conv2d(8, 8, 1))
    if change == "trained":
        model.middle.requires_grad_(True)
        model.last = nn.Identity()  # type: ignore[assignment]
    if change == "read":
        model.first = nn.Sequential(model.first, nn.Sigmoid())  # type: ignore[assignment]
        model.last = nn.Identity()  # type: ignore[assignment]
    program = survey(model, (torch.randn(4, 3, 16, 16),), {}, lambda p: p).captures[0].program
    assert unread_inputs(program).sites == (1 if change == "training" else 0)


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.GroupNorm(3, 3), nn.BatchNorm2d(3)])
def test_a_norm_s_bias_needs_nothing_of_its_input(norm: nn.Module) -> None:
    model, x = Normed(norm), torch.randn(4, 3, 16, 16)
    norm.weight.requires_grad_(False)  # type: ignore[union-attr]
    assert saved_bytes(model, x, False) > 4 * x.numel()
    assert saved_bytes(model, x, True) < 4 * x.numel() // 8  # a batch norm's statistics
    want = stepped(model, x)
    memopt.compile(model, "1GB", lowering="eager", numerics="exact")
    assert all(torch.equal(a, b) for a, b in zip(want, stepped(model, x), strict=True))


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + 1).sum()
