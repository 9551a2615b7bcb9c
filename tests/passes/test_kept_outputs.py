"""A clamp's backward reads its output where that is held anyway: the same bits, and fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.capture import survey
from memopt.passes.kept_outputs import kept_outputs
from memopt.pipeline import prepare
from memopt.runtime.measure import measure_step
from tests.passes.test_packing import stepped


class Clamped(nn.Module):
    """Two linear layers around a clamp, whose output the second holds."""

    def __init__(self, clamp: nn.Module, held: bool = True) -> None:
        super().__init__()
        self.first, self.clamp = nn.Linear(32, 64), clamp
        self.second = nn.Linear(64, 8) if held else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.clamp(self.first(x))).sum()


class Gate(nn.Module):
    """The product's backward holds both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return (h * nn.functional.relu6(h)).square().sum()


def sites(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    found = survey(
        model.to(dtype), (torch.randn(16, 32, dtype=dtype),), {}, prepare("eager", frozenset({"kept_outputs"})), "eager"
    )
    once = kept_outputs(found.captures[0].program)
    assert kept_outputs(once.program).sites == 0
    return once.sites


@pytest.mark.parametrize(
    "clamp", [nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(-0.1, 0.3), nn.LeakyReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(0.0)]
)
def test_it_fires_and_changes_no_bit(clamp: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = Clamped(clamp), torch.randn(16, 32)
    x[0, 0], x[1] = float("nan"), 0.0
    assert sites(model) == 1
    want = stepped(model, x)
    compiled = memopt.compile(model, "1GB", lowering="eager", numerics="exact")
    for found, expected in zip(stepped(compiled, x), want, strict=True):
        assert torch.equal(found.nan_to_num(7e7), expected.nan_to_num(7e7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bound", "fires"), [(6.0, 1), (0.5, 1), (0.7, 0), (0.1, 0)])
def test_in_narrow_types_it_fires_where_they_hold_the_bounds(dtype: torch.dtype, bound: float, fires: int) -> None:
    """bf16 rounds 0.7 to 0.6992, which is less than the 0.7 that the backward compares with."""
    assert sites(Clamped(nn.Hardtanh(-bound, bound)), dtype) == fires


@pytest.mark.parametrize(
    "model",
    [Gate(), Clamped(nn.LeakyReLU(-0.1)), Clamped(nn.ReLU6(), held=False), Clamped(nn.Hardswish()), Clamped(nn.ELU())],
)
def test_it_leaves_alone_what_it_may_not_touch_or_would_not_gain_by(model: nn.Module) -> None:
    assert sites(model) == 0


@pytest.mark.long
def test_a_mobilenet_takes_fewer_bytes() -> None:
    """relu6 between convolutions: one of two values a layer is saved. No recomputation, no budget to speak of."""
    model, inputs = mobilenet()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(**inputs).loss.backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    options: Any = {"optimizer": optimizer, "lowering": "eager", "numerics": "exact"}
    without = memopt.plan(model, inputs, budget="4GB", passes="-kept_outputs", **options).plan.peak
    model, inputs = mobilenet()  # another: batch norm has moved on
    options["optimizer"] = optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    memopt.compile(model, "4GB", **options)
    model(**inputs).loss.backward()
    assert all(map(torch.equal, want, [p.grad for p in model.parameters() if p.grad is not None]))
    took = measure_step(lambda: model(**inputs).loss, optimizer, resident=[model, inputs], warmup=0, repeats=0)
    assert took.peak_bytes == pytest.approx(model.memopt.plan.peak, rel=0.01)
    assert took.peak_bytes < 0.9 * without


def mobilenet() -> tuple[Any, dict[str, Tensor]]:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(
        depth_multiplier=0.25, image_size=64, num_labels=10, classifier_dropout_prob=0.0, tf_padding=False
    )
    model = MobileNetV2ForImageClassification(config).train()
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return model, {"pixel_values": images, "labels": torch.arange(16) % 10}
