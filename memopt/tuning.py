"""Where the planner's bytes are not the code's, as fusion makes temporaries vanish: count, correct, plan again.

The difference between the code's peak and the budget moves the budget the solver is given, and it solves again. No byte
of the step is allocated meanwhile. What is returned holds the budget by the code's bytes, or is infeasible. The code is
Inductor's (memopt/legs.py), or the eager lowering's with kernels of its own (memopt/generation.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from memopt.edit import Remake, edit
from memopt.fusion import Fences
from memopt.planned import Planned
from memopt.plans import REUSED, Plan, Problem, Status
from memopt.report import PlanResult
from memopt.solvers import bounded, solve
from memopt.solvers.overlapped import bounded_overlapped, solve_overlapped

log = logging.getLogger("memopt")

Phases = dict[str, int]  # peak bytes of each
Peaks = Callable[[Plan, Fences], tuple[Phases, Phases]]  # of a plan's code, with the outputs held, and released

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
    """The lowerings of one step within one budget. peaks: of a plan's code. tightest: fences there are.

    tries: in the order made. lowest: those of the way down that no budget has a part in. code: peaks of what was
    lowered, by decisions and fences. asked: the solver's budgets of plans whose lower bound nobody sought yet, by
    decisions.
    """

    planned: Planned
    peaks: Peaks
    time_limit: float
    tightest: Fences = Fences.TIGHT
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
            self.code[key] = self.peaks(plan, fences)
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
            if slack < -FAR * self.budget and plan.chosen and fences is not self.tightest:
                fences = self.tightest if slack < -FARTHER * self.budget else Fences(fences + 1)
                continue
            plan = self.solved(plan.peak + slack)
            if slack < 0 and self.known(plan, fences) and fences is not self.tightest:
                fences = Fences(fences + 1)

    def hold(self, plan: Plan) -> None:
        """Lower a saved plan as it is, ever closer to its kernels until the code holds the budget."""
        for fences in Fences:
            if fences > self.tightest or self.lower(plan, fences).peak <= self.budget:
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
            made = self.lower(self.solved(int(floor * share)), self.tightest)
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


def tuned(
    planned: Planned, peaks: Peaks, time_limit: float, search: bool = True, tightest: Fences = Fences.TIGHT
) -> Planned:
    """The plan corrected until its code holds the budget and wastes little of it.

    peaks: of a plan's code. search: before a step is refused, for the least its code can take, which is the floor;
    without, the outcome is the least of a few. tightest: as of `Tuner`. An infeasible outcome has that status, and this
    as its peak.
    """
    tuner = Tuner(planned, peaks, time_limit, tightest)
    tuner.approach()
    if search and planned.result.plan.solver != REUSED and min(t.peak for t in tuner.tries) > tuner.budget:
        tuner.explore()
    return _with(planned, planned.problem, tuner.bounded(_best(tuner, tuner.budget)), tuner.budget)


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
