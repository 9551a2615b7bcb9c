"""Under Inductor the planner's bytes are not the code's: fusion makes temporaries vanish. Compile, count, correct.

The plan is lowered under fake tensors and its code rehearsed (memopt/runtime/rehearse.py). The difference between the
rehearsed peak and the budget moves the budget the solver is given, and it solves again. No byte of the step is
allocated meanwhile. What is returned holds the budget by rehearsal, or is infeasible.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from memopt.compose import without_outputs
from memopt.edit import edit
from memopt.graph import StepGraph
from memopt.inductor import generate
from memopt.pipeline import Planned, apply_plan
from memopt.plans import Plan, Problem, Status
from memopt.program import Program, split
from memopt.report import PlanResult
from memopt.solvers import solve
from memopt.timeline import phase_peaks

log = logging.getLogger("memopt")

TRIES = 4  # lowerings at most; each costs a compilation
CLOSE = 0.03  # a plan whose peak is within this share of the budget is not worth another compilation


@dataclass(frozen=True)
class Try:
    """A plan and the peak bytes of each phase its code will have: with the outputs held, and released."""

    plan: Plan
    phases: dict[str, int]
    released: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def tuned(planned: Planned, program: Program, time_limit: float) -> Planned:
    """The plan corrected until its code, rehearsed, holds the budget and wastes little of it.

    program: the one program of the step. An infeasible outcome has that status, and the least peak found as floor.
    """
    problem, budget = planned.problem, planned.problem.budget
    asked, plan = budget, planned.result.plan
    tries: list[Try] = []
    while len(tries) < TRIES:
        tries.append(Try(plan, *lowered_phases(planned, program, plan)))
        log.info("lowering %d: solver says %d bytes, code %s, budget %d", len(tries), plan.peak, tries[-1].phases, budget)
        slack = budget - tries[-1].peak
        if slack >= 0 and (slack <= CLOSE * budget or not plan.chosen):
            break
        asked = plan.peak + slack
        following = solve(replace(problem, budget=max(asked, 1)), time_limit=time_limit)
        if following.chosen in [t.plan.chosen for t in tries]:
            break
        plan = following
    return _with(planned, problem, _best(tries, budget), budget)


def _best(tries: list[Try], budget: int) -> Try:
    held = [t for t in tries if t.peak <= budget]
    return min(held, key=lambda t: (t.plan.seconds, t.peak)) if held else min(tries, key=lambda t: t.peak)


def _with(planned: Planned, problem: Problem, best: Try, budget: int) -> Planned:
    status = best.plan.status
    if best.peak > budget:
        status = Status.INFEASIBLE
    elif status is Status.INFEASIBLE:  # the solver's bytes said no, the code's say yes
        status = Status.FEASIBLE
    floor = min(best.plan.floor, best.peak)
    plan = replace(best.plan, peak=best.peak, status=status, floor=best.peak if status is Status.INFEASIBLE else floor)
    after = edit(problem.graph, plan.chosen) if status is not Status.INFEASIBLE else problem.graph
    result: PlanResult = replace(planned.result, plan=plan, after=after, lowered=best.phases)
    return replace(planned, result=result, lowered_released=best.released)


def lowered_phases(planned: Planned, program: Program, plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes of each phase when the program with this plan runs as Inductor's code.

    Twice: when the caller holds the outputs beside the loss through the backward, and when it has let them go.
    """
    graph = planned.whole
    forward, backward = split(apply_plan(program, graph, planned.expanded(plan)))
    edited, static = edit(planned.problem.graph, plan.chosen), graph.bytes_of(graph.inputs)
    kept, mine = _ownership(graph, program)
    ahead = generate(forward, False, program.forward_outputs, mine).rehearsed(mine)
    code = generate(backward, True, 0, mine)
    held = {"forward": static + ahead.peak, "backward": static + kept + code.rehearsed(mine).peak}
    fewer, mine = _ownership(without_outputs(graph), program)
    free = {"forward": static + ahead.peak, "backward": static + fewer + code.rehearsed(mine).peak}
    return {**phase_peaks(edited), **held}, {**phase_peaks(without_outputs(edited)), **free}


def _ownership(graph: StepGraph, program: Program) -> tuple[int, Callable[[str], bool]]:
    """Bytes of the forward's outputs the caller holds, and whether an input of the backward is the step's to free."""
    named = (program.name(node) for node in program.outputs[0] if node is not None)
    held = [name for name in named if name in graph.outputs]
    others = {*graph.input_storages, *(graph.storage_of(name) for name in held)}

    def mine(name: str) -> bool:
        if name in program.kinds:
            return program.kinds[name] == "tangent"
        tensor = program.prefix + name
        return tensor not in graph.tensors or graph.storage_of(tensor) not in others

    return graph.bytes_of(held), mine
