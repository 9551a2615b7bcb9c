"""Under Inductor the planner's bytes are not the code's: fusion makes temporaries vanish. Compile, count, correct.

The plan is lowered under fake tensors and its code rehearsed (memopt/runtime/rehearse.py). The difference between the
rehearsed peak and the budget moves the budget the solver is given, and it solves again. No byte of the step is
allocated meanwhile. What is returned holds the budget by rehearsal, or is infeasible.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from memopt.compose import LET_GO, without_outputs
from memopt.edit import Remake, edit
from memopt.fusion import Fences
from memopt.graph import StepGraph
from memopt.inductor import Half, generate
from memopt.joints import Part
from memopt.pipeline import Planned
from memopt.plans import REUSED, Plan, Problem, Status
from memopt.profiling import SECONDS
from memopt.program import Program, split
from memopt.relay import Leg, rehearsed
from memopt.report import PlanResult
from memopt.runtime import rows
from memopt.runtime.opcost import OpCosts
from memopt.runtime.rehearse import Workspace, nothing
from memopt.solvers import bounded, solve
from memopt.solvers.overlapped import bounded_overlapped, solve_overlapped
from memopt.timeline import phase_peaks, rounded

log = logging.getLogger("memopt")

Run = tuple[Program, Part]  # one run of a graph: its program, and what it passes to the others

TRIES = 5  # lowerings at most; each costs a compilation
ABOVE = (1.0, 1.02, 1.05, 1.1, 1.18, 1.3)  # of the solver's floor: where else to look before a step is refused
DESCENTS = 4  # times the least code found is asked for a byte less, before a step is refused with it as floor
HOPELESS = 1.5  # times the budget: code that an infeasible plan is not lowered again for
CLOSE = 0.015  # a plan whose peak is within this share of the budget is not worth another compilation
FAR = 0.04  # code this share of the budget above it is held to the plan's kernels instead of planned smaller
FARTHER = 0.15  # and this share of it above, at once as closely as can be


@dataclass(frozen=True)
class Try:
    """A plan and the peak bytes of each phase its code will have: with the outputs held, and released."""

    plan: Plan
    fences: Fences
    phases: dict[str, int]
    released: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())


@dataclass
class Tuner:
    """The lowerings of one step within one budget. runs: the programs of the step. needs: of library calls.

    tries: in the order made. lowest: those of the way down that no budget has a part in. code: peaks of what was
    lowered, by decisions and fences. asked: the solver's budgets of plans whose lower bound nobody sought yet, by
    decisions.
    """

    planned: Planned
    runs: Sequence[Run]
    time_limit: float
    needs: Workspace = nothing
    tries: list[Try] = field(default_factory=list)
    lowest: list[Try] = field(default_factory=list)
    code: dict[Any, tuple[dict[str, int], dict[str, int]]] = field(default_factory=dict)
    asked: dict[tuple[Remake, ...], int] = field(default_factory=dict)

    @property
    def budget(self) -> int:
        return self.planned.problem.budget

    def lower(self, plan: Plan, fences: Fences) -> Try:
        key = plan.chosen, fences
        if key not in self.code:
            self.code[key] = lowered_phases(self.planned, self.runs, plan, fences, self.needs)
        made = Try(plan, fences, *self.code[key])
        self.tries.append(made)
        log.info("lowering %d: solver says %d bytes, code %s, %s", len(self.tries), plan.peak, made.phases, fences.name)
        return made

    def solved(self, budget: int) -> Plan:
        """A plan without its lower bound: of those that are tried one is taken, and a bound can take seconds."""
        problem = replace(self.planned.problem, budget=max(budget, 1))
        solver = solve_overlapped if self.planned.overlaps else solve
        plan = solver(problem, time_limit=self.time_limit, bound=False)
        self.asked[plan.chosen] = problem.budget
        return plan

    def bounded(self, made: Try) -> Try:
        """The same with the lower bound of its plan."""
        if made.plan.chosen not in self.asked:
            return made
        problem = replace(self.planned.problem, budget=self.asked[made.plan.chosen])
        prove = bounded_overlapped if self.planned.overlaps else bounded
        return replace(made, plan=prove(problem, made.plan, time_limit=self.time_limit))

    def known(self, plan: Plan, fences: Fences) -> bool:
        return any(t.plan.chosen == plan.chosen and t.fences is fences for t in self.tries)

    def approach(self) -> None:
        """Correct the solver's budget by what the code takes; far above it, hold the kernels to the plan first.

        Not where solver and code both say that the budget is far off."""
        plan, fences = self.planned.result.plan, Fences.FREE
        if plan.solver == REUSED:
            return self.hold(plan)
        while len(self.tries) < TRIES and not self.known(plan, fences):
            made = self.lower(plan, fences)
            slack = self.budget - made.peak
            if plan.status is Status.INFEASIBLE and made.peak > HOPELESS * self.budget:
                break
            if slack >= 0 and (slack <= CLOSE * self.budget or not plan.chosen):
                break
            if slack < -FAR * self.budget and plan.chosen and fences is not Fences.TIGHT:
                fences = Fences.TIGHT if slack < -FARTHER * self.budget else Fences(fences + 1)
                continue
            plan = self.solved(plan.peak + slack)
            if slack < 0 and self.known(plan, fences) and fences is not Fences.TIGHT:
                fences = Fences(fences + 1)

    def hold(self, plan: Plan) -> None:
        """Lower a saved plan as it is, ever closer to its kernels until the code holds the budget."""
        for fences in Fences:
            if self.lower(plan, fences).peak <= self.budget:
                break

    def explore(self) -> None:
        """Further plans until one's code holds the budget. Only where to stop depends on it, so all that is refused is
        refused with the same floor, which is planned: `lowest` ends with it."""
        for made in self.down():
            self.lowest.append(made)
            if made.peak <= self.budget:
                break

    def down(self) -> Iterator[Try]:
        """Code at fixed shares above the solver's floor, then what is planned below the least of it, and so on.

        At its floor the solver may trade bytes that the code holds elsewhere, so the code's least can lie above it.
        """
        floor, best = self.solved(1).peak, None
        for share in ABOVE:
            made = self.lower(self.solved(int(floor * share)), Fences.TIGHT)
            best = made if best is None or made.peak < best.peak else best
            yield made
            if best.peak == floor:  # the code is the plan, and no plan takes less
                return
        for _ in range(DESCENTS):
            assert best is not None
            made = self.below(best.peak)
            if made.peak >= best.peak:
                break
            best = made
            yield made

    def below(self, peak: int) -> Try:
        """The least code found on the way to a budget of a byte less than this."""
        problem = replace(self.planned.problem, budget=peak - 1)
        result = replace(self.planned.result, budget=peak - 1, plan=self.solved(peak - 1))
        other = replace(self, planned=replace(self.planned, problem=problem, result=result), tries=[], lowest=[])
        other.approach()
        self.tries += other.tries
        return min(other.tries, key=lambda t: t.peak)


def tuned(planned: Planned, runs: Sequence[Run], time_limit: float, kind: str = "cpu", search: bool = True) -> Planned:
    """The plan corrected until its code, rehearsed, holds the budget and wastes little of it.

    runs: the programs of the step in the order they run. kind: of device, where library calls are tried for what they
    need. search: before a step is refused, for the least its code can take, which is the floor; without, the outcome is
    the least of a few. An infeasible outcome has that status, and this as its peak.
    """
    with OpCosts(kind, seconds_limit=SECONDS) as meter:
        tuner = Tuner(planned, runs, time_limit, partial(_workspace, meter))
        tuner.approach()
        if search and planned.result.plan.solver != REUSED and min(t.peak for t in tuner.tries) > tuner.budget:
            tuner.explore()
    return _with(planned, planned.problem, tuner.bounded(_best(tuner, tuner.budget)), tuner.budget)


def _workspace(meter: OpCosts, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """What a library call needs inside itself: tried, unless other ranks take part in it."""
    known = rows.workspace(op, args)
    return meter.workspace(op, args, kwargs) if known is None else known


def _best(tuner: Tuner, budget: int) -> Try:
    held = [t for t in tuner.tries if t.peak <= budget]
    if held:
        return min(held, key=lambda t: (t.plan.seconds, t.fences, t.peak))
    return min(tuner.lowest or tuner.tries, key=lambda t: t.peak)


def _with(planned: Planned, problem: Problem, best: Try, budget: int) -> Planned:
    status = best.plan.status
    if best.peak > budget:
        status = Status.INFEASIBLE
    elif status is Status.INFEASIBLE:  # the solver's bytes said no, the code's say yes
        status = Status.FEASIBLE
    plan = replace(best.plan, peak=best.peak, status=status)
    after = edit(problem.graph, plan.chosen) if status is not Status.INFEASIBLE else problem.graph
    result: PlanResult = replace(planned.result, plan=plan, after=after, lowered=best.phases)
    return replace(planned, result=result, lowered_released=best.released, fences=best.fences)


def lowered_phases(
    planned: Planned, legs: Sequence[Run], plan: Plan, fences: Fences, needs: Workspace = nothing
) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes of each phase when the programs with this plan run as Inductor's code.

    Twice: when the caller holds the outputs beside the loss through the backward, and when it has let them go.
    """
    graph = planned.whole
    edited, block = edit(planned.problem.graph, plan.chosen), planned.problem.block
    static = sum(rounded(graph.storages[name].nbytes, block) for name in graph.input_storages)
    made = compiled_legs(replace(planned, result=replace(planned.result, plan=plan)), legs, fences)

    def phases(whole: StepGraph, after: StepGraph) -> dict[str, int]:
        peaks = rehearsed(made, frozenset(whole.outputs), _seeds(whole), needs, block)
        return phase_peaks(after, block) | {"forward": static + peaks[0], "backward": static + peaks[1]}

    return phases(graph, edited), phases(without_outputs(graph), without_outputs(edited))


def compiled_legs(planned: Planned, runs: Sequence[Run], fences: Fences) -> tuple[Leg, ...]:
    """Inductor's code of every run; runs of one graph whose decisions are the same share it."""
    known: dict[Any, tuple[Half, Half | None]] = {}
    made = []
    for place, (program, part) in enumerate(runs):
        key = planned.signatures[place], planned.decisions(place) if fences is Fences.FREE else place
        if key not in known:
            changed = planned.applied(program, planned.remakes(place), fences)
            known[key] = _halves(changed, _ownership(planned.whole, changed, part))
        made.append(Leg(part, *known[key]))
    return tuple(made)


def _halves(program: Program, mine: Callable[[str], bool]) -> tuple[Half, Half | None]:
    if not program.outputs[1]:
        return generate(program.module, False, program.forward_outputs, mine), None
    forward, backward = split(program)
    first = generate(forward, False, program.forward_outputs, mine)
    return first, generate(backward, True, 0, mine, first.strides)


def _seeds(graph: StepGraph) -> frozenset[str]:
    """Gradients of outputs that the caller holds through the backward."""
    return frozenset(name for step in graph.steps if step.op == LET_GO for name in step.reads)


def _ownership(graph: StepGraph, program: Program, part: Part) -> Callable[[str], bool]:
    """Whether an input of a half, by name, is the step's to free or write into: no parameter, input or output."""
    seeds = _seeds(graph)
    outputs = (program.name(node) for node in program.outputs[0] if node is not None)
    own = part.graph
    others = {*own.input_storages, *(own.storage_of(name) for name in outputs if name in own.outputs)}

    def mine(name: str) -> bool:
        tensor = program.prefix + name
        if name in program.kinds:
            return program.kinds[name] == "tangent" and tensor not in seeds
        return tensor not in own.tensors or own.storage_of(tensor) not in others

    return mine
