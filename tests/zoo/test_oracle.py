"""Predicted live bytes are the real ones after every operation of forward and backward, planned tight or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import memopt
from memopt.models import load
from memopt.runtime.measure import measure_step
from memopt.runtime.resident import resident_tensors
from memopt.session import Session
from tests.zoo.oracle import Ledger, predicted, probed

# preset -> (batch, sequence): large enough that activations, not optimizer states, are most of the step
SIZES = {
    "llama-tiny": (8, 64), "gpt2-tiny": (8, 64), "bert-tiny": (8, 64), "vit-tiny": (64, 0), "resnet-tiny": (32, 0),
    "t5-tiny": (8, 32), "lstm-tiny": (32, 16), "unet-tiny": (4, 0),
}  # fmt: skip
SHARES = (0.8, 0.6, 0.4)


class Zoo:
    """One preset, built with fixed weights and inputs as often as asked."""

    def __init__(self, name: str) -> None:
        self.name, self.work = name, load(name)
        torch.manual_seed(0)
        self.inputs = self.work.inputs(*SIZES[name])

    def model(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = self.work.build().train()
        return model, torch.optim.AdamW(model.parameters())

    def loss(self, model: torch.nn.Module) -> torch.Tensor:
        return self.work.loss(model(**self.inputs))

    def gradients(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """Loss and gradients of the step drawn with seed 2."""
        torch.manual_seed(2)
        model.zero_grad(set_to_none=True)
        loss = self.loss(model)
        loss.backward()
        found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad(set_to_none=True)
        return found


MORE = ("gpt2-tiny", "bert-tiny", "vit-tiny", "resnet-tiny", "t5-tiny", "unet-tiny")  # in the long tests


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.long if name in MORE else ()) for name in SIZES])
def zoo(request: pytest.FixtureRequest) -> Zoo:
    torch._dynamo.reset()
    return Zoo(request.param)


def compiled(zoo: Zoo, budget: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model, optimizer = zoo.model()
    memopt.compile(model, budget, optimizer=optimizer, example_inputs=zoo.inputs, lowering="eager", numerics="exact")
    return model, optimizer


@pytest.mark.slow
@pytest.mark.usefixtures("unadvised")
def test_the_budget_is_held_and_every_byte_is_foreseen(zoo: Zoo) -> None:
    """At the least share of the free peak that is feasible, and at the floor."""
    plain = zoo.gradients(zoo.model()[0])
    floor, free = bounds(zoo)
    feasible = [share for share in SHARES if share * free >= floor]
    for budget in (floor, *(int(share * free) for share in feasible[-1:])):
        check(zoo, budget, plain)


def bounds(zoo: Zoo) -> tuple[int, int]:
    """The least peak of any plan, and the peak without a budget; of one capture."""
    session = compiled(zoo, 2**32)[0].memopt._session
    (survey,) = session.surveys.values()
    with pytest.raises(memopt.BudgetError) as refused:
        Session(session.model, replace(session.request, budget=1)).adopt(survey, "eager")
    return refused.value.floor_bytes, session.latest.result.plan.peak


def check(zoo: Zoo, budget: int, plain: list[torch.Tensor]) -> None:
    """Compile within the budget and hold the step to it."""
    with probed() as ledger:
        model, optimizer = compiled(zoo, budget)
        hold(zoo, model, optimizer, ledger, plain)
    planned = model.memopt._session.latest.released
    assert ledger.held == predicted(planned.after)
    took = measure_step(
        lambda: zoo.loss(model), optimizer, resident=[model, zoo.inputs, *ledger.constants], warmup=0, repeats=0
    )
    assert took.peak_bytes <= budget
    assert took.peak_bytes == planned.plan.peak


def hold(zoo: Zoo, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ledger: Ledger, plain: Any) -> None:
    """Twice (transformers writes into the configuration at the first call), then with states, under the ledger."""
    same(plain, zoo.gradients(model))
    zoo.loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    ledger.register([*resident_tensors(model, optimizer, zoo.inputs), *ledger.constants])
    ledger.on = True
    zoo.loss(model).backward()
    ledger.on = False
    optimizer.zero_grad()


def same(plain: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    assert len(found) == len(plain)
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)
