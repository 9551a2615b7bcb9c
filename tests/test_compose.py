"""The whole step from its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.beds import BEDS
from memopt.api import make_request
from memopt.errors import BudgetError
from memopt.runtime.here import device_of
from memopt.session import Session


def session(accumulate: int, budget: int | str) -> tuple[Session, dict[str, object]]:
    """Forward and backward of a tiny Llama without an optimizer."""
    model, inputs = BEDS["llama-tiny"].make()
    request = make_request(device_of(model), budget, None, (), "exact", "eager", "", accumulate, "tiny")
    return Session(model, replace(request, has_optimizer=False), measure=False), dict(inputs)


def test_gradients_accumulate_without_an_optimizer() -> None:
    """The gradients of earlier micro-batches are alive from the start: their bytes are in the peak, once."""
    single, inputs = session(1, "50%")
    double, _ = session(2, "50%")
    before = single.plan_for((), inputs).result.plan.peak
    accumulated = double.plan_for((), inputs).result.plan.peak
    gradients = sum(p.nbytes for p in single.model.parameters())
    assert before < accumulated <= before + gradients


@pytest.mark.long
def test_without_an_optimizer_too_a_refusal_has_its_floor_and_ways_out() -> None:
    """One of the ways tried is half the batch, accumulated: it reads gradients that no optimizer's phase declared."""
    refused, inputs = session(1, 1)  # less than the parameters: no smaller input is tried
    with pytest.raises(BudgetError) as error:
        refused.plan_for((), inputs)
    refused, inputs = session(1, error.value.floor_bytes - 1)
    with pytest.raises(BudgetError) as error:
        refused.plan_for((), inputs)
    assert error.value.floor_bytes == min(
        way.peak_bytes for way in error.value.ways_out if way.change.startswith("budget=")
    )
