"""memopt itself: its solver on its own offers, with its bound and its floor."""

from __future__ import annotations

from benchmarks.planners.answer import Answer
from benchmarks.planners.export import Work
from benchmarks.planners.schedule import from_edited
from memopt.edit import edit
from memopt.garbage import collected_later
from memopt.passes.recompute import Recompute
from memopt.plans import Plan, Problem
from memopt.solvers import solve


def memopt_plan(work: Work, budget: int) -> Answer:
    """What `memopt.plan` would choose for this graph. Below its floor it answers with its lowest plan."""
    plan = planned(work, budget)
    schedule = from_edited(work.graph, edit(work.graph, plan.chosen))
    return Answer(schedule, plan.lower_bound, plan.floor, plan.status.value)


def planned(work: Work, budget: int) -> Plan:
    """The offers and the solver, as memopt.pipeline calls them for eager kernels."""
    with collected_later():
        remakes = Recompute().propose(work.graph, work.seconds)
        return solve(Problem(work.graph, remakes, budget, work.seconds, work.block))


def floor(work: Work) -> int:
    """The least peak memopt knows for the work, bytes: what it answers a budget of one byte with."""
    return planned(work, 1).floor
