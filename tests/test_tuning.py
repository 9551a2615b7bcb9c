"""Inductor: what the plan says of the code is what the code takes, and the budget holds."""

from __future__ import annotations

import pytest
import torch

import memopt
from benchmarks.beds import BEDS
from memopt.attach import attach
from memopt.models import load
from memopt.pipeline import silent
from memopt.runtime.measure import measure_step
from memopt.workbench import Asked, bench


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-tiny", "resnet-tiny"])
def test_saved_values_are_foreseen_as_the_forward_lays_them_out(name: str) -> None:
    """Inductor turns a convolution's input and weight to channels-last and saves those, not what it was given."""
    made = bench(load(name), 16, 0, "fp32", "sgd", "cpu")
    torch.manual_seed(0)
    model, inputs = made.build()
    asked = Asked("100%", (), "reordered", "", "inductor", 1, None, silent)
    session = asked.session(made, model, measure=True)
    planned = session.plan_for((), inputs)
    attach(session)
    measured = measure_step(lambda: model(**inputs), session.request.optimizer, resident=[model, inputs], repeats=0)
    assert measured.peak_bytes == planned.released.peak


@pytest.mark.long
def test_a_planned_llama_holds_its_budget_under_inductor_and_is_predicted() -> None:
    made = bench(load("llama-tiny"), 8, 64, "fp32", "sgd", "cpu")
    torch.manual_seed(0)
    model, inputs = made.build()
    plain = [value.detach() for value in _gradients(model, inputs)]
    asked = Asked("100%", (), "reordered", "", "inductor", 1, None, silent)
    whole = asked.session(made, model, measure=True).plan_for((), inputs).result.peak

    session = Asked(int(whole * 0.85), (), "reordered", "", "inductor", 1, None, silent).session(made, model, True)
    attach(session)
    close = zip(plain, _gradients(model, inputs), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in close)
    measured = measure_step(lambda: model(**inputs), session.request.optimizer, resident=[model, inputs])
    assert session.result is not None
    assert session.result.plan.chosen
    assert measured.peak_bytes <= int(whole * 0.85)
    assert measured.peak_bytes == session.result.peak


def _gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    loss = model(**inputs)
    loss.backward()
    found = [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.long
def test_a_refusal_names_the_eager_lowering_where_that_needs_less() -> None:
    """A convolution's backward is a library call either way; what Inductor stores around it is more."""
    model, inputs = BEDS["unet-tiny"].make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with pytest.raises(memopt.BudgetError) as refused:
        memopt.plan(model, inputs, budget=1, lowering="inductor", optimizer=optimizer)
    (way,) = [way for way in refused.value.ways_out if way.change == 'lowering="eager"']
    assert way.peak_bytes < refused.value.floor_bytes
    found = memopt.plan(model, inputs, budget=way.peak_bytes, lowering="eager", optimizer=optimizer)
    assert found.plan.peak <= way.peak_bytes
