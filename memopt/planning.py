"""From inputs to a plan: capture, price and plan, in each lowering, with and without what rewrites cost time.

The answer is a plan that holds the budget, the fastest of those tried, or a BudgetError with the lowest floor of them
and its ways out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

from torch import nn

from memopt.accuracy import Accuracy
from memopt.capture import Survey, survey
from memopt.chunking import widened
from memopt.dumps import plan_made
from memopt.generation import with_kernels, with_kernels_beside
from memopt.noise import LOSSY, Noise
from memopt.passes.stream import StreamAttention
from memopt.pipeline import Costs, Progress, make_plan, optimizer_phase, prepare, silent, step_graph
from memopt.planfile import PlanFile
from memopt.planned import Planned
from memopt.plans import Plan
from memopt.profiling import measured_costs
from memopt.recurrent import fused_cells
from memopt.refusal import FOUR, Refused, Spelling, hopeless, infeasible
from memopt.report import PlanResult
from memopt.request import Request
from memopt.reused import chunks_of, identity
from memopt.rewrites import rewritten_levers
from memopt.seams import parts_of
from memopt.smaller import Call
from memopt.streams import LADDER, WIDER, as_written, in_chunks, plain_of, streams
from memopt.table import to_text
from memopt.timeline import peak
from memopt.weights import WEIGHTS, packable, packed_twin

WORTH = 0.9  # of the seconds with a rewrite, to do without it
SEQUENCES = frozenset({StreamAttention.name})  # streams along the batch, and is left out first: it takes longest
SLOWED = 0.02  # of a step's seconds: less is no reason to stream in more chunks

Streamed = tuple[Survey, frozenset[str]]  # a step, and the rewrites left out of it


@dataclass
class Planner:
    """Plans one model's steps. request: what was asked; its budget is already in bytes.

    measure: price operations by running each once on this device; False where nothing may be allocated. advise: find
    the ways out of a refusal, which takes further plans; spelling: how they are written. missed: bytes by which real
    steps exceeded what was predicted of them. surveys: by what `input_key` gives, lowering, rewrites left out, chunks.
    refused: the latest plan that did not hold the budget. patient: try other lowerings and streams in chunks, a capture
    each, before a refusal.
    """

    model: nn.Module
    request: Request
    gradients: str = "loss"
    plan_file: PlanFile | None = None
    progress: Progress = silent
    measure: bool = True
    surveys: dict[Any, Survey] = field(default_factory=dict)
    refused: PlanResult | None = None
    advise: bool = True
    patient: bool = True
    spelling: Spelling = field(default_factory=Spelling)
    missed: int = 0
    accuracy: Accuracy = field(default_factory=Accuracy)

    def chosen(self, key: Any, call: Call) -> Planned:
        """The plan in the lowering asked for; where none of its holds the budget and the choice was left to us, in the
        spare one, unless that is hopeless. Raises BudgetError with the lowest floor of those tried."""
        tried: list[tuple[Planned, Survey]] = []
        for lowering in self.request.lowerings if self.patient else self.request.lowerings[:1]:
            started = time.perf_counter()
            found, left_out = self.matching(key, call, lowering)
            if self.plan_file is not None and lowering != self.request.lowerings[-1] and not self.saved_of(found):
                continue
            request = replace(self.request, lowering=lowering)
            planned, found = self.widest(key, call, request, found, left_out, time.perf_counter() - started)
            planned, found = self.smaller(key, call, replace(planned, left_out=left_out), found)
            tried.append((planned, found))
            if not planned.result.infeasible:
                planned = self.faster(key, call, planned)
                return self.adopted(planned.instead_of(tried[0][0].result) if len(tried) > 1 else planned)
            if hopeless(planned.result) and self.request.update == "step":  # in backward only one lowering may update
                break
        self.refuse(*min(tried, key=lambda pair: pair[0].result.plan.peak), call)

    def widest(
        self, key: Any, call: Call, request: Request, found: Survey, left_out: frozenset[str], seconds: float
    ) -> tuple[Planned, Survey]:
        """The plan in which losses take as much at once as nothing else has to give way to; that of the survey as it is
        where there is none. seconds: of its capture."""
        other = self.wider(found, request)
        if other is not None:
            planned = self.tried(other, request, seconds, call, search=False)
            if not planned.result.infeasible:
                self.surveys[key, request.lowering, left_out, other.chunks] = other
                return planned, other
        return self.tried(found, request, seconds, call, search=False), found

    def wider(self, found: Survey, request: Request) -> Survey | None:
        """The step with the largest chunks of its losses that add nothing to it, by rough plans."""
        if self.plan_file is not None or not streams(found):
            return None
        costs = self.costs(found)
        base = self.rough(found, request, costs)
        for chunks in () if base.infeasible else WIDER:
            other = in_chunks(found, chunks)
            rough = self.rough(other, request, costs)
            if not rough.infeasible and rough.plan.seconds <= base.plan.seconds:
                return other
        return None

    def smaller(self, key: Any, call: Call, planned: Planned, found: Survey) -> tuple[Planned, Survey]:
        """Where no plan of the step as it is holds the budget: one whose step streams in chunks, if that does; else the
        one that takes least, of a search that is the same whatever the budget, so that refusals name the same floor."""
        if self.plan_file is not None or not planned.result.infeasible or not self.patient:
            return planned, found
        request = replace(self.request, lowering=planned.lowering)

        def made(other: Streamed, search: bool) -> tuple[Planned, Survey]:
            survey, left_out = other
            self.surveys[key, planned.lowering, left_out, survey.chunks] = survey
            new = self.tried(survey, request, planned.result.timings["capture"], call, search)
            return replace(new, left_out=left_out), survey

        every: list[Streamed] = []
        for left_out in (SEQUENCES, frozenset[str]()):  # each a capture, so the next only where the last did not do
            ladder = self.ladder(key, call, planned, found, left_out)
            every += ladder
            best = self.best_of(ladder, request)
            if best is not None:
                streamed = made(best, search=False)
                if not streamed[0].result.infeasible:
                    return streamed
        least = min(every, key=lambda other: self.lowest(other[0], request).peak, default=None)
        searched = [] if least is None else [made(least, search=True)]
        if not (request.lowering == "inductor" and self.measure):  # the plan is that of a search
            searched.append((planned, found))
        elif least is None or self.lowest(found, request).peak < searched[0][0].result.plan.peak:
            searched.append(made((found, planned.left_out), search=True))
        return min(searched, key=lambda pair: (pair[0].result.infeasible, pair[0].result.plan.peak))

    def ladder(self, key: Any, call: Call, planned: Planned, found: Survey, left_out: frozenset[str]) -> list[Streamed]:
        """The step with what streams in ever more chunks, without these rewrites as well; empty where nothing does, it
        would be of no use, or one of these is not there to be left out."""
        names = {rewrite.name for rewrite in self.request.rewrites if rewrite.costly}
        if not names or not left_out < names or hopeless(planned.result):
            return []
        left_out |= planned.left_out
        base = self.surveyed(key, call, planned.lowering, left_out, LADDER[0], found)
        return [(in_chunks(base, chunks), left_out) for chunks in LADDER] if streams(base) else []

    def best_of(self, ladder: Sequence[Streamed], request: Request) -> Streamed | None:
        """The first after which more chunks are no better, by rough plans; None where no such plan holds."""
        best: tuple[Streamed, PlanResult] | None = None
        for other in ladder:
            found = self.rough(other[0], request)
            if best is not None and not _better(found, best[1]):
                break
            best = other, found
        return None if best is None or best[1].infeasible else best[0]

    def rough(self, found: Survey, request: Request, costs: Costs | None = None) -> PlanResult:
        """A plan by quick methods, of the planner's own bytes. costs: of the survey, if they are known."""
        costs = costs or self.costs(found)
        return make_plan(found, replace(request, quick=True), costs, 0.0, self.progress).result

    def lowest(self, found: Survey, request: Request) -> Plan:
        """The plan that takes least of the planner's bytes. Rough ones are no measure of it: they end far above."""
        return make_plan(found, replace(request, budget=1), self.costs(found), 0.0, self.progress).result.plan

    def faster(self, key: Any, call: Call, planned: Planned) -> Planned:
        """The plan without a rewrite that costs time, where the step as it was written fits and is faster."""
        written = planned.result
        fits = written.plain is not None and written.baseline_peak <= self.request.budget
        if self.plan_file is not None or not fits or written.baseline_seconds > WORTH * written.step_seconds:
            return planned
        best = planned
        for name in (lever.lever for lever in written.rewrites):
            started, left_out = time.perf_counter(), frozenset({name})
            found = self.surveyed(key, call, planned.lowering, left_out)
            request = replace(self.request, lowering=planned.lowering, off=self.request.off | left_out)
            other = self.tried(found, request, time.perf_counter() - started, call)
            if not other.result.infeasible and other.result.step_seconds <= WORTH * best.result.step_seconds:
                best = replace(other, left_out=left_out).noted(f"does without {name}: it takes time, and there is room")
        return best

    def matching(self, key: Any, call: Call, lowering: str) -> tuple[Survey, frozenset[str]]:
        """The survey in this lowering, and the rewrites left out of it: those that a saved plan did without."""
        chunks = 0 if self.plan_file is None else chunks_of(self.plan_file)
        found = self.surveyed(key, call, lowering, chunks=chunks)
        rewritten = () if self.plan_file is None or self.saved_of(found) else rewritten_levers(found)
        for left_out in (frozenset({each.lever}) for each in rewritten):
            other = self.surveyed(key, call, lowering, left_out, chunks)
            if self.saved_of(other):
                return other, left_out
        return found, frozenset()

    def surveyed(
        self,
        key: Any,
        call: Call,
        lowering: str,
        left_out: frozenset[str] = frozenset(),
        chunks: int = 0,
        other: Survey | None = None,
    ) -> Survey:
        """The survey of these inputs in this lowering, made once. other: with other chunks, which knows how the step
        was written. Raises CaptureError."""
        known = (key, lowering, left_out, chunks)
        if known not in self.surveys:
            self.progress("capture", None)
            plain = () if other is None else plain_of(other)
            made = self.capture(call, lowering=lowering, beside=not plain, left_out=left_out, chunks=chunks)
            self.surveys[known] = as_written(made, plain) if plain else made
        return self.surveys[known]

    def capture(
        self,
        call: Call,
        exact: bool | None = None,
        lowering: str = "",
        beside: bool = True,
        left_out: frozenset[str] = frozenset(),
        chunks: int = 0,
        model: nn.Module | None = None,
    ) -> Survey:
        """Every graph of the step for these inputs. exact, lowering: if left out as requested. beside, chunks: as in
        `survey`. left_out: rewrites to do without. model: another one than this. Raises CaptureError."""
        lowering = lowering or self.request.lowering
        exact = self.request.exact if exact is None else exact
        clean, rewrites = prepare(lowering, self.request.off), self.request.without(left_out)
        return survey(model or self.model, *call, clean, lowering, self.gradients, exact, rewrites, beside, chunks)

    def saved_of(self, found: Survey) -> bool:
        """Whether the saved plan is of this survey's graphs."""
        return self.plan_file is not None and self.plan_file.identity.get("graph") == identity(found)["graph"]

    def adopt(self, found: Survey, lowering: str) -> Planned:
        """Price and plan a survey by itself. Raises BudgetError."""
        planned = self.tried(found, replace(self.request, lowering=lowering), 0.0)
        if planned.result.infeasible:
            self.refuse(planned, found)
        return self.adopted(planned)

    def adopted(self, planned: Planned) -> Planned:
        plan_made(lambda: to_text(planned.result), planned.result.to_json)
        return planned

    def refuse(self, planned: Planned, found: Survey, call: Call | None = None) -> NoReturn:
        """Raise BudgetError for this plan."""
        self.refused = self.advised(planned, found, call)
        raise infeasible(self.refused)

    def tried(
        self, found: Survey, request: Request, capture_seconds: float, call: Call | None = None, search: bool = True
    ) -> Planned:
        """The plan of a survey, perhaps infeasible. call: inputs the step may be tried on. search: as in `tuned`."""
        costs = self.costs(found)
        seen = self.measure and bool(set(LOSSY) - request.off) and self.short(found, costs)
        probe = self.accuracy.probe(found, call, request) if seen else None
        make = partial(self.planned, found, request, costs, capture_seconds, search)
        return self.accuracy.held(make, probe, request.max_grad_error).missing(self.missed)

    def short(self, found: Survey, costs: Costs) -> bool:
        """Whether the step as it is takes more than the budget."""
        whole = step_graph(found, parts_of(found), self.request, optimizer_phase(found, self.request), costs)
        return peak(whole, self.request.device.allocator_block) > self.request.budget - self.missed

    def planned(
        self, found: Survey, request: Request, costs: Costs, capture_seconds: float, search: bool, noise: Noise
    ) -> Planned:
        """The plan within the budget less what real steps were seen to take beyond theirs."""
        request = replace(request, budget=max(request.budget - self.missed, 1))
        planned = make_plan(found, request, costs, capture_seconds, self.progress, self.plan_file, noise)
        programs = [capture.program for capture in found.captures]
        if request.lowering == "inductor" and self.measure:
            from memopt.legs import tuned_code  # loads Inductor

            runs = tuple(zip(programs, parts_of(found), strict=True))
            planned = replace(planned, beside=request.kernels)
            planned = tuned_code(planned, runs, request.time_limit, request.device.kind, search)
            planned = with_kernels_beside(planned, programs) if request.kernels else planned
        if request.lowering == "eager" and request.kernels:
            planned = with_kernels(planned, programs, request, search)
        if request.lowering == "eager":
            planned = widened(planned, programs)
        return planned

    def advised(self, planned: Planned, found: Survey, call: Call | None) -> PlanResult:
        """The refused result with its ways out, unless nobody will read them."""
        result, request = planned.result, replace(self.request, lowering=planned.lowering)
        if not self.advise:
            return result
        self.progress("ways out", None)
        # beside: nobody asks what a way out is without memopt
        capture = partial(self.capture, lowering=planned.lowering, beside=False)
        reordered = partial(capture, exact=False) if any(fused_cells(c.program.graph) for c in found.captures) else None
        eager = partial(self.capture, lowering="eager", beside=False) if planned.lowering == "inductor" else None
        packs = FOUR not in dict(request.weights) and bool(packable(self.model))
        refused = Refused(
            result, found, request, self.costs, call, capture, reordered, eager,
            (lambda call: capture(call, model=packed_twin(self.model, WEIGHTS[FOUR])[0])) if packs else None,
            self.spelling, self.accuracy.used,
        )  # fmt: skip
        return replace(result, ways_out=refused.ways_out())

    def costs(self, found: Survey) -> Costs:
        """Seconds and workspaces of the operations on this device; none when it is not here."""
        programs = [capture.program for capture in found.captures]
        return measured_costs(programs, self.request.device, self.measure, found.lowering)


def _better(one: PlanResult, other: PlanResult) -> bool:
    """Whether a plan fits where the other does not, is faster if both do, takes less if neither."""
    if one.infeasible != other.infeasible:
        return other.infeasible
    if one.infeasible:
        return one.plan.peak < other.plan.peak
    return one.step_seconds < (1 - SLOWED) * other.step_seconds
