"""What a solver is asked and what it answers: `Problem` -> `Plan`. Values only; no torch, no solver library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from memopt.edit import GRADIENT, Remake, edit, taken
from memopt.graph import Step, StepGraph
from memopt.overlap import elapsed
from memopt.timeline import peak

ROUNDING = 1e-6  # of a limit: a solver's tolerance
MAX_GRAD_ERROR = 0.1  # a tenth of its length: less than what another batch of the same data changes of a gradient
REUSED = "plan file"  # the solver of a plan whose decisions were saved earlier


class Status(StrEnum):
    """fits: nothing had to be done. optimal: proven within the solver's gap. feasible: holds, gap stated.
    infeasible: no plan of the offered remakes holds; `Plan.peak` is then the least peak found (the floor)."""

    FITS = "fits"
    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"


@dataclass(frozen=True)
class Problem:
    """graph: the whole step. remakes: every offer of every trade. budget: bytes. block: allocator rounding, bytes.

    seconds: step name -> predicted seconds of one run of that step (missing: 0), the price of a copy of it.
    limits: resource -> how much of it all packing may take together (`memopt.edit.taken`).
    links: names of packing and unpacking steps -> seconds of a link that they take while others run: what one way does
    not fit beside the forward, or the other beside the rest, is waited for. Bounds know it; plans are priced by `edit`.
    """

    graph: StepGraph
    remakes: tuple[Remake, ...]
    budget: int
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)
    block: int = 1
    limits: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[str, float] = field(default_factory=dict, repr=False)

    def cost(self, step: Step) -> float:
        """Seconds of the step, or of the one it is a copy of."""
        found = self.seconds.get(step.name)  # the name as it is comes first: '__and___1' may be a step of its own
        return self.seconds.get(original(step.name), 0.0) if found is None else found

    @cached_property
    def elapsed(self) -> float:
        """Seconds of the step as it is."""
        return elapsed(self.graph.steps, self.cost)

    def allows(self, chosen: Iterable[Remake]) -> bool:
        """Whether these remakes keep to the limits, as solvers do to within their rounding."""
        return not self.exceeded(chosen)

    def exceeded(self, chosen: Iterable[Remake]) -> dict[str, float]:
        """Resource -> what these remakes take of it, where that is more than its limit."""
        amounts = taken(chosen) if self.limits else {}
        return {name: size for name, size in amounts.items() if size > self.limits.get(name, size) * (1 + ROUNDING)}


@dataclass(frozen=True)
class Plan:
    """chosen: the remakes to apply. peak: bytes, always `peak(edit(graph, chosen))`. seconds: added to the step.

    lower_bound: no choice of the offers, as proposed, holds the budget with fewer added seconds (0.0 when nothing was
    proven). solver: who answered.
    """

    chosen: tuple[Remake, ...]
    peak: int
    seconds: float
    lower_bound: float
    status: Status
    solver: str = ""

    @property
    def lossy(self) -> bool:
        """Whether one of the remakes rounds."""
        return GRADIENT in taken(self.chosen)

    @property
    def grad_error(self) -> float:
        """What the lossy ones among the remakes make of the gradient, ||g' - g|| / ||g||, as estimated."""
        return math.sqrt(taken(self.chosen).get(GRADIENT, 0.0))

    @property
    def floor(self) -> int | None:
        """The least budget that is planned, bytes: of a refused one, whose search went to the end. One byte less is
        refused by the same search. None where none was made: a smaller budget may hold, or the plan was a saved one."""
        return self.peak if self.status is Status.INFEASIBLE and self.solver != REUSED else None

    @property
    def gap(self) -> float:
        """(seconds - lower_bound) / seconds; 0.0 when nothing was added."""
        return 0.0 if self.seconds <= 0 else max(0.0, (self.seconds - self.lower_bound) / self.seconds)


def added_seconds(problem: Problem, edited: StepGraph) -> float:
    """Seconds of the steps the edit added less those it made unnecessary, never below zero. Of copies that go on while
    others run, those that somebody waits for (`memopt.overlap.elapsed`)."""
    return max(0.0, elapsed(edited.steps, problem.cost) - problem.elapsed)


def original(step: str) -> str:
    """The name of the step a copy was made of ('mm_3__2' -> 'mm_3'); any other name as it is, '__and__' too."""
    name, _, count = step.rpartition("__")
    return name if name and count.isdecimal() else step


def simulated(problem: Problem, chosen: tuple[Remake, ...], solver: str, lower_bound: float = 0.0) -> Plan:
    """The plan for these remakes with peak and seconds taken from the edited graph, nothing else.

    Its status is FEASIBLE within the budget and the limits, else INFEASIBLE.
    """
    edited = edit(problem.graph, chosen)
    top = peak(edited, problem.block)
    status = Status.FEASIBLE if top <= problem.budget and problem.allows(chosen) else Status.INFEASIBLE
    return Plan(chosen, top, added_seconds(problem, edited), lower_bound, status, solver)


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step as it ran: peak_bytes of torch's allocations, seconds, and the peak bytes of each phase.

    reserved_bytes: peak of what torch's CUDA allocator took from the device; 0 on CPU, which keeps no reserve.
    profiled: the seconds are of a step under the profiler, which slows it.
    """

    peak_bytes: int
    seconds: float
    phases: Mapping[str, int] = field(default_factory=dict)
    reserved_bytes: int = 0
    profiled: bool = False
