"""Inductor: what the plan says of the code is what the code takes, and the budget holds."""

from __future__ import annotations

import pytest
import torch

from memopt.models import load
from memopt.pipeline import silent
from memopt.runtime.measure import measure_step
from memopt.session import attach
from memopt.workbench import Asked, bench

CLOSE = 2**20  # bytes: the contract's absolute tolerance; on this model the prediction is off by less than 200


@pytest.mark.slow
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
    assert abs(measured.peak_bytes - session.result.peak) <= 0.03 * session.result.peak
    assert abs(measured.peak_bytes - session.result.peak) <= CLOSE


def _gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    loss = model(**inputs)
    loss.backward()
    found = [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found
