"""Refusals where a step can stream: the same floor whatever was asked, and it is planned; on a stand-in for Inductor's
code that takes more than the plan says, most in the chunks that a plan of the planner's bytes would choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import memopt
from memopt import legs
from memopt.planned import Planned
from memopt.planning import Planner
from memopt.plans import Status
from memopt.solvers import solve
from memopt.streams import LADDER, in_chunks, streamed_nodes
from tests.passes.test_stream import WIDTH, Mixed, trained

LEAST, MORE = 1.5, 2.0  # times the plan's bytes: of the step in the most chunks, and in fewer or none
NOT_FOUND = 1.2  # times its floor: below, only a search finds code that holds the budget


def tuned(planned: Planned, runs: Any, time_limit: float, kind: str, search: bool) -> Planned:
    """Inductor's code, as if it were that much more than planned."""
    chunks = next((node.args[-1] for program, _ in runs for node in streamed_nodes(program)), 0)
    more = LEAST if chunks == LADDER[-1] else MORE
    least = int(more * solve(replace(planned.problem, budget=1)).peak) + 1
    budget = planned.problem.budget
    if budget < (least if search else NOT_FOUND * least):
        plan = replace(planned.result.plan, peak=least if search else int(NOT_FOUND * least), status=Status.INFEASIBLE)
    else:
        plan = solve(replace(planned.problem, budget=max(int(budget / more), 1)))
        plan = replace(plan, peak=min(int(plan.peak * more), budget), status=Status.FEASIBLE)
    result = replace(planned.result, plan=plan, lowered={"backward": plan.peak})
    return replace(planned, result=result)


@pytest.fixture(autouse=True)
def large_code(monkeypatch: pytest.MonkeyPatch, unadvised: None) -> None:
    monkeypatch.setattr(legs, "tuned_code", tuned)


def asked(budget: int, lowering: str = "inductor", rows: int = 1024) -> int | None:
    """The floor that a refusal names, or None where the budget is held."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    try:
        trained(Mixed(3), torch.randn(4, rows, WIDTH), budget, lowering=lowering)
    except memopt.BudgetError as refused:
        return refused.floor_bytes
    return None


@pytest.mark.long
def test_every_refusal_names_the_same_floor_which_is_planned() -> None:
    floor = asked(1)
    assert floor is not None
    for share in (0.9, 0.99):
        assert asked(int(share * floor)) == floor
    for share in (1.0, 1.02, 1.1):
        assert asked(int(share * floor)) is None


@pytest.mark.long
def test_chunks_that_rough_plans_see_no_use_in_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    floor = asked(1, "eager", 96)
    rough = Planner.rough
    monkeypatch.setattr(Planner, "rough", lambda self, found, *args: rough(self, in_chunks(found, LADDER[0]), *args))
    assert asked(1, "eager", 96) == floor
