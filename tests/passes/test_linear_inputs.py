"""Sampled inputs of linear layers: offered where a weight's gradient alone reads them, and only within the bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.passes.linear_inputs import CompAct, WtaCrs, multiplied
from memopt.photograph import photograph
from memopt.runtime.measure import measure_step
from tests.passes.test_packing import captured, stepped
from tests.passes.test_quantise import compiled


class Falling(nn.Module):
    """Wide values that the backward reads for the gradient of a weight, and for nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.fall = nn.ModuleList([nn.Linear(512, 16) for _ in range(4)])
        self.rise = nn.ModuleList([nn.Linear(16, 512) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for rise, fall in zip(self.rise, self.fall, strict=True):
            x = x + fall(rise(x))
        return x.square().mean()


def inputs() -> Tensor:
    return torch.randn(512, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("trade", [WtaCrs, CompAct])
def test_inputs_of_linear_layers_are_offered(trade: Any) -> None:
    graph = photograph(captured(Falling(), inputs()))
    offers = {offer.value: offer for offer in trade().propose(graph, {})}
    wide = {v for v in offers if graph.tensors[v].shape == (512, 512)}
    assert len(wide) == 4
    for value in wide:
        assert offers[value].stand_in
        assert offers[value].made[0][1].nbytes < 0.26 * graph.storages[value].nbytes


def test_what_a_nonlinearity_reads_as_well_is_left_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 512))
            self.fall = nn.Linear(512, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = (x @ self.weight).exp()
            return (self.fall(h).sum() + h.tanh().sum()).square()

    graph = photograph(captured(Both(), inputs()))
    assert not multiplied(graph, next(step.writes[0] for step in graph.steps if step.op == "aten.exp.default"))


@pytest.mark.parametrize("lever", ["wta_crs", "compact"])
def test_within_the_usual_bound_it_is_not_taken_and_beyond_it_the_step_fits(lever: str) -> None:
    torch.manual_seed(0)
    model, x = Falling(), inputs()
    want = stepped(model, x)
    whole = compiled(Falling(), x, "4GB").memopt.plan.peak
    budget, options = int(0.8 * whole), {"passes": "-recompute,-stream", "allow": (lever,)}
    with pytest.raises(memopt.BudgetError) as refused:
        compiled(Falling(), x, budget, **options)
    assert any(way.change.startswith("max_grad_error=") and way.fits for way in refused.value.ways_out)
    optimizer = torch.optim.AdamW(model.parameters())
    compiled(model, x, budget, optimizer=optimizer, max_grad_error=3.0, **options)
    got = stepped(model, x)
    assert torch.equal(got[0], want[0])
    result: Any = model.memopt.plan
    assert 0.1 < result.measured_grad_error < 3.0
    measured = measure_step(lambda: model(x), optimizer, resident=[model, x])
    assert measured.peak_bytes == result.peak <= budget
