"""A saved plan's decisions on a step that was captured anew, which must be the same step."""

from __future__ import annotations

from math import sqrt

import torch

from memopt.capture import Survey
from memopt.edit import DISK, GRADIENT, HOST
from memopt.errors import PlanFileError
from memopt.planfile import PlanFile, check_identity
from memopt.plans import REUSED, Plan, Problem, simulated
from memopt.report import SCHEMA
from memopt.units import format_size


def reused(problem: Problem, plan_file: PlanFile, survey: Survey) -> Plan:
    """The plan of the saved decisions. Raises PlanFileError where they are of another step, or exceed a limit."""
    check_identity(plan_file, identity(survey))
    plan = simulated(problem, plan_file.chosen(problem.graph, problem.remakes), REUSED)
    exceeded = problem.exceeded(plan.chosen)
    if GRADIENT in exceeded:
        raise PlanFileError(
            f"the plan's lossy levers put the gradient off by {plan.grad_error:.2g} of its length, more than "
            f"max_grad_error={sqrt(problem.limits[GRADIENT]):.2g} allows; raise it, or plan anew"
        )
    for resource, where in ((HOST, "in host memory"), (DISK, "on disk")):
        if resource in exceeded:
            raise PlanFileError(
                f"the plan keeps {format_size(int(exceeded[resource]))} {where}, more than the {resource}_budget of "
                f"{format_size(int(problem.limits[resource]))}; raise it, or plan anew"
            )
    return plan


def identity(survey: Survey) -> dict[str, str]:
    """What a plan file is checked against."""
    graphs = "-".join(capture.signature for capture in survey.captures) + (f"+{survey.chunks}" if survey.chunks else "")
    return {"graph": graphs, "torch": torch.__version__, "schema": str(SCHEMA)}


def chunks_of(plan_file: PlanFile) -> int:
    """In how many chunks the saved plan's step streams; 0 where it does not."""
    _, plus, count = plan_file.identity.get("graph", "").partition("+")
    return int(count) if plus and count.isdigit() else 0
