"""lowering="auto": Inductor, and the eager lowering where no code of Inductor's holds the budget; here a stand-in's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import memopt
from memopt import legs
from memopt.errors import BudgetError
from memopt.planfile import save_plan
from memopt.planned import Planned
from memopt.plans import Status
from memopt.report import PlanResult
from tests.test_api import batch, built, planned, train

CODE = 1 << 30  # bytes that the code of the stand-in takes, whatever the plan


@pytest.fixture(autouse=True)
def large_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's code holds no budget below CODE."""

    def tuned(made: Planned, *_: Any) -> Planned:
        plan = replace(made.result.plan, peak=CODE, status=Status.INFEASIBLE)
        return replace(made, result=replace(made.result, plan=plan, lowered={"backward": CODE}))

    monkeypatch.setattr(legs, "tuned_code", tuned)


def compiled(budget: int, lowering: str = "auto", **options: Any) -> tuple[Any, Any]:
    model, optimizer = built()
    return memopt.compile(model, budget, optimizer=optimizer, lowering=lowering, **options), optimizer


@pytest.fixture(scope="module")
def tight() -> PlanResult:
    """The eager plan within nine tenths of the step's bytes."""
    return planned(budget=int(planned().peak * 0.9))


def test_auto_falls_back_to_eager_and_says_so(tight: PlanResult) -> None:
    model, optimizer = compiled(tight.budget)
    found = train(model, optimizer)
    plain, its_optimizer = built()
    want = train(plain, its_optimizer)
    assert all(a.equal(b) for a, b in zip(found, want, strict=True))  # Inductor draws other masks
    assert model.memopt.plan.plan.chosen == tight.plan.chosen
    assert model.memopt.measured.peak_bytes <= tight.budget
    note = "runs in the eager lowering: Inductor's code takes 1.07 GB (1.00 GiB) at least, of a budget of"
    assert any(line.startswith(note) for line in model.memopt.plan.to_json()["notes"])
    assert "runs in the eager lowering" in model.memopt.report()


def test_inductor_by_name_refuses_and_names_eager(tight: PlanResult) -> None:
    with pytest.raises(BudgetError, match='lowering="eager"') as refused:
        compiled(tight.budget, "inductor", example_inputs=batch())
    assert refused.value.floor_bytes == CODE


@pytest.mark.usefixtures("unadvised")
def test_where_neither_holds_the_lower_floor_is_named_and_planned(tight: PlanResult) -> None:
    with pytest.raises(BudgetError) as refused:
        compiled(1000, example_inputs=batch())
    assert refused.value.floor_bytes < CODE
    model, _ = compiled(refused.value.floor_bytes, example_inputs=batch())
    assert model.memopt.plan.peak <= refused.value.floor_bytes


def test_a_saved_plan_runs_in_the_lowering_it_was_made_for(tight: PlanResult, tmp_path: Path) -> None:
    save_plan(tight, tmp_path / "plan.json")
    model, _ = compiled(tight.budget, example_inputs=batch(), plan_file=tmp_path / "plan.json")
    assert model.memopt.plan.reused
    assert model.memopt.plan.plan.chosen == tight.plan.chosen
