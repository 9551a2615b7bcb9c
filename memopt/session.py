"""A compiled model at work: plan each new shape of input before it runs, run it by the plan, watch that it holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import fx, nn

from memopt.accuracy import Accuracy
from memopt.capture import Capture, Survey, survey, tensor_names
from memopt.dumps import PLANNED, dump_program, plan_made
from memopt.early import Updates, anchors
from memopt.errors import BudgetError
from memopt.hosts import without_full_mask
from memopt.lowering import Transform, lower, signature
from memopt.noise import LOSSY, Noise
from memopt.optim.stepper import Stepper
from memopt.pipeline import (
    Costs,
    Planned,
    Progress,
    make_plan,
    optimizer_phase,
    prepare,
    silent,
    step_graph,
)
from memopt.planfile import PlanFile
from memopt.profiling import measured_costs
from memopt.program import Program, copied
from memopt.recurrent import fused_cells
from memopt.refusal import Refused, Spelling, hopeless, infeasible
from memopt.report import PlanResult
from memopt.request import Request
from memopt.reused import chunks_of, identity
from memopt.rewrites import rewritten_levers
from memopt.runtime.resident import resident_tensors
from memopt.seams import parts_of
from memopt.shapes import input_key
from memopt.smaller import Call
from memopt.streams import LADDER, in_chunks, streams
from memopt.table import to_text
from memopt.timeline import peak
from memopt.units import format_size
from memopt.watch import StepWatch

log = logging.getLogger("memopt")

WORTH = 0.9  # of the seconds with a rewrite, to do without it
SLOWED = 0.02  # of a step's seconds: less is no reason to stream in more chunks
CORRECTIONS = 2  # times a step that broke the budget is planned again


@dataclass
class Session:
    """State behind one compiled model. request: what was asked; its budget is already in bytes.

    measure: price operations by running each once on this device; False where nothing may be allocated. advise: find
    the ways out of a refusal, which takes further plans; spelling: how they are written. missed: bytes by which real
    steps exceeded what was predicted of them; corrections: how often that led to another plan. plans, surveys: by what
    `input_key` gives; current: the key of the latest step.
    """

    model: nn.Module
    request: Request
    gradients: str = "loss"
    plan_file: PlanFile | None = None
    progress: Progress = silent
    measure: bool = True
    plans: dict[Any, Planned] = field(default_factory=dict)
    surveys: dict[Any, Survey] = field(default_factory=dict)
    current: Any = None
    outputs_held: bool = True
    refused: PlanResult | None = None
    inputs: Any = ()
    advise: bool = True
    spelling: Spelling = field(default_factory=Spelling)
    missed: int = 0
    corrections: int = 0
    turns: dict[str, int] = field(default_factory=dict)
    accuracy: Accuracy = field(default_factory=Accuracy)

    def __post_init__(self) -> None:
        self.watch = StepWatch(self.resident, self.request.device.kind)
        self.stepper = Stepper(self.request.optimizer) if self.request.optimizer is not None else None

    @property
    def latest(self) -> Planned | None:
        """The plan of the latest step, or of the latest inputs planned for."""
        return self.plans.get(self.current)

    def plan_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Planned:
        """The plan for inputs of these shapes: made at first sight, under fake tensors. Raises BudgetError."""
        kwargs = without_full_mask(self.model, kwargs)
        key = input_key(self.model, args, kwargs)
        if key not in self.plans:
            self.plans[key] = self.chosen(key, (tuple(args), dict(kwargs)))
        self.current = key
        return self.plans[key]

    def chosen(self, key: Any, call: Call) -> Planned:
        """The plan in the lowering asked for; where none of its holds the budget and the choice was left to us, in the
        spare one, unless that is hopeless. Raises BudgetError with the lowest floor of those tried."""
        tried: list[tuple[Planned, Survey]] = []
        for lowering in self.request.lowerings:
            started = time.perf_counter()
            found, left_out = self.matching(key, call, lowering)
            if self.plan_file is not None and lowering != self.request.lowerings[-1] and not self.saved_of(found):
                continue
            request = replace(self.request, lowering=lowering)
            planned = replace(self.tried(found, request, time.perf_counter() - started, call), left_out=left_out)
            planned, found = self.streamed(key, call, planned, found)
            tried.append((planned, found))
            if not planned.result.infeasible:
                planned = self.faster(key, call, planned)
                return self.adopted(planned.instead_of(tried[0][0].result) if len(tried) > 1 else planned)
            if hopeless(planned.result):
                break
        self.refuse(*min(tried, key=lambda pair: pair[0].result.plan.peak), call)

    def streamed(self, key: Any, call: Call, planned: Planned, found: Survey) -> tuple[Planned, Survey]:
        """The best plan with what streams in so many chunks or so many, where no plan without fits: one that fits,
        and fast; if none does, the one that takes least."""
        permitted = any(rewrite.costly for rewrite in self.request.rewrites)
        if self.plan_file is not None or not permitted or not planned.result.infeasible or hopeless(planned.result):
            return planned, found
        started = time.perf_counter()
        base = self.surveyed(key, call, planned.lowering, planned.left_out, LADDER[0])
        request, least = replace(self.request, lowering=planned.lowering), planned.result
        best: Survey | None = None
        for other in [in_chunks(base, chunks) for chunks in LADDER] if streams(base) else []:
            rough = make_plan(other, request, self.costs(other), 0.0, self.progress).result
            if not _better(rough, least):
                break
            best, least = other, rough
        if best is None:
            return planned, found
        self.surveys[key, planned.lowering, planned.left_out, best.chunks] = best
        made = replace(self.tried(best, request, time.perf_counter() - started, call), left_out=planned.left_out)
        return (made, best) if _better(made.result, planned.result) else (planned, found)

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
            other = self.surveyed(key, call, lowering, left_out)
            if self.saved_of(other):
                return other, left_out
        return found, frozenset()

    def surveyed(
        self, key: Any, call: Call, lowering: str, left_out: frozenset[str] = frozenset(), chunks: int = 0
    ) -> Survey:
        """The survey of these inputs in this lowering, made once. Raises CaptureError."""
        known = (key, lowering, left_out, chunks)
        if known not in self.surveys:
            self.progress("capture", None)
            self.surveys[known] = self.capture(call, lowering=lowering, left_out=left_out, chunks=chunks)
        return self.surveys[known]

    def capture(
        self,
        call: Call,
        exact: bool | None = None,
        lowering: str = "",
        beside: bool = True,
        left_out: frozenset[str] = frozenset(),
        chunks: int = 0,
    ) -> Survey:
        """Every graph of the step for these inputs. exact, lowering: if left out as requested. beside, chunks: as in
        `survey`. left_out: rewrites to do without. Raises CaptureError."""
        lowering = lowering or self.request.lowering
        exact = self.request.exact if exact is None else exact
        clean, rewrites = prepare(lowering, self.request.off), self.request.without(left_out)
        return survey(self.model, *call, clean, lowering, self.gradients, exact, rewrites, beside, chunks)

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

    def tried(self, found: Survey, request: Request, capture_seconds: float, call: Call | None = None) -> Planned:
        """The plan of a survey, perhaps infeasible. call: inputs the step may be tried on."""
        costs = self.costs(found)
        seen = self.measure and bool(set(LOSSY) - request.off) and self.short(found, costs)
        probe = self.accuracy.probe(found, call, request) if seen else None
        make = partial(self.planned, found, request, costs, capture_seconds)
        return self.accuracy.held(make, probe, request.max_grad_error).missing(self.missed)

    def short(self, found: Survey, costs: Costs) -> bool:
        """Whether the step as it is takes more than the budget."""
        whole = step_graph(found, parts_of(found), self.request, optimizer_phase(found, self.request), costs)
        return peak(whole, self.request.device.allocator_block) > self.request.budget - self.missed

    def planned(self, found: Survey, request: Request, costs: Costs, capture_seconds: float, noise: Noise) -> Planned:
        """The plan within the budget less what real steps were seen to take beyond theirs."""
        request = replace(request, budget=max(request.budget - self.missed, 1))
        planned = make_plan(found, request, costs, capture_seconds, self.progress, self.plan_file, noise)
        if request.lowering == "inductor" and self.measure:
            from memopt.tuning import tuned  # loads Inductor

            runs = tuple(zip((capture.program for capture in found.captures), parts_of(found), strict=True))
            planned = tuned(planned, runs, request.time_limit, request.device.kind)
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
        refused = Refused(
            result, found, request, self.costs, call, capture, reordered, eager, self.spelling, self.accuracy.used
        )
        return replace(result, ways_out=refused.ways_out())

    def step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """A training step begins: have its plan ready and watch it. True if plans were made anew.

        Raises BudgetError at the first sight of inputs that do not fit; what already runs is never stopped by one.
        """
        self.watch.end()
        anew = self.exceeded() and self.replanned(args, kwargs)
        planned = self.plan_for(args, kwargs)
        if self.stepper is not None:
            self.stepper.follow(planned.update)
        self.inputs = (args, kwargs)
        self.watch.begin(self.current, planned.result.plan.peak)
        self.inputs = ()
        return anew

    def exceeded(self) -> bool:
        """Whether the last step watched took more than the budget: then what it exceeded its plan by is set aside."""
        key, measured = self.watch.take() or (None, None)
        planned = self.plans.get(key)
        if measured is None or planned is None or self.corrections == CORRECTIONS:
            return False
        if measured.peak_bytes <= self.request.budget:
            return False
        self.missed += measured.peak_bytes - self.seen_from(planned).plan.peak
        self.corrections += 1
        took, budget = format_size(measured.peak_bytes), format_size(self.request.budget)
        log.warning("a step took %s of %s: planning again", took, budget)
        return True

    def replanned(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Plan again; False, and the plans as they were, where no plan holds what was missed as well."""
        kept, guards, advise = self.plans, self.watch.guards, self.advise
        self.plans, self.watch.guards, self.advise = {}, {}, False
        try:
            self.plan_for(args, kwargs)
        except BudgetError as refused:
            self.plans, self.watch.guards, self.corrections = kept, guards, CORRECTIONS
            log.warning("no plan takes that much less; the step goes on as planned, above its budget: %s", refused)
            return False
        finally:
            self.advise = advise
        return True

    def costs(self, found: Survey) -> Costs:
        """Seconds and workspaces of the operations on this device; none when it is not here."""
        programs = [capture.program for capture in found.captures]
        return measured_costs(programs, self.request.device, self.measure, found.lowering)

    def resident(self) -> Iterable[torch.Tensor]:
        """What is alive before a step: the model, gradients being accumulated, optimizer state, the inputs."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return resident_tensors(self.model, self.request.optimizer, gradients, self.inputs)

    def backend(self, module: fx.GraphModule, inputs: Sequence[Any], key: Any = None) -> Callable[..., Any]:
        """The Dynamo backend: differentiate, insert the plan's remakes, lower. key: of the plan to go by.

        A graph that runs several times in a step (for each layer of a loop that breaks) is lowered once for every
        set of decisions the plan has for its runs.
        """
        started = time.perf_counter()
        spare = fx.GraphModule(module, copied(module.graph))
        mine: list[tuple[Planned, str]] = []
        plan = self.plans.get(key)
        lowering, left_out = (plan.lowering, plan.left_out) if plan else (self.request.lowering, frozenset[str]())
        run = self.lowered(
            module, inputs, lambda program: self.transform(program, key, lowering, mine), lowering, left_out,
            lambda _: self.early(mine), plan.chunks if plan else 0,
        )  # fmt: skip
        if mine and len(mine[0][0].places(mine[0][1])) > 1:
            run = self.dispatched(run, spare, inputs, *mine[0])
        if self.latest is not None:
            timings = {**self.latest.result.timings, "lower": time.perf_counter() - started}
            self.plans[self.current] = replace(self.latest, result=replace(self.latest.result, timings=timings))
        return run

    def lowered(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        transform: Transform,
        lowering: str,
        left_out: frozenset[str],
        updates: Callable[[Program], Updates] = lambda program: {},
        chunks: int = 0,
    ) -> Callable[..., Any]:
        loss_only = self.gradients == "loss" and all(found.loss_only for found in self.surveys.values())
        names, exact, rewrites = tensor_names(self.model), self.request.exact, self.request.without(left_out)
        return lower(
            module, inputs, names, transform, lowering, False, loss_only, self.seen, exact, rewrites, updates=updates,
            chunks=chunks,
        )  # fmt: skip

    def early(self, mine: Sequence[tuple[Planned, str]]) -> Updates:
        """What the backward of the graph is to update by its plan, and how."""
        if not mine or self.stepper is None:
            return {}
        planned, params = mine[0][0], dict(self.model.named_parameters())
        placed = anchors(planned.result.after, planned.update.in_backward)
        return {name: (step, self.stepper.consumer(name, params[name])) for name, step in placed.items()}

    def dispatched(
        self, first: Callable[..., Any], spare: fx.GraphModule, inputs: Sequence[Any], planned: Planned, mark: str
    ) -> Callable[..., Any]:
        """The graph lowered for each of its runs in a step; a call goes to the one whose turn it is."""
        places = planned.places(mark)
        made = {planned.decisions(places[0]): first}
        for place in places[1:]:
            if (decided := planned.decisions(place)) not in made:
                twin = fx.GraphModule(spare, copied(spare.graph))
                apply = partial(self.applied, planned=planned, place=place)
                made[decided] = self.lowered(
                    twin, inputs, apply, planned.lowering, planned.left_out, chunks=planned.chunks
                )
        turns = [made[planned.decisions(place)] for place in places]

        def run(*args: Any) -> Any:
            turn = self.turns[mark] = self.turns.get(mark, -1) + 1
            return turns[turn % len(turns)](*args)

        return run

    def seen(self, held: bool) -> None:
        """The backward began: whether the caller holds outputs beside the loss. The plan assumed that it does."""
        self.outputs_held = held

    @property
    def result(self) -> PlanResult | None:
        """The latest plan, with the peak it leads to when the caller lets go of the outputs beside the loss."""
        return None if self.latest is None else self.seen_from(self.latest)

    def seen_from(self, planned: Planned) -> PlanResult:
        """The plan as it turns out for this caller, who holds the outputs beside the loss or lets go of them."""
        return planned.result if self.outputs_held else planned.released

    def transform(self, program: Program, key: Any, lowering: str, mine: list[tuple[Planned, str]]) -> Program:
        """The program the plan asks for. A graph no survey saw is planned by itself, within the whole budget.

        lowering: what will run it. mine: gets the plan the program is part of, and its signature.
        """
        mark = signature(program)
        known = (self.plans.get(key), *reversed(self.plans.values()))
        planned = next((p for p in known if p is not None and p.lowering == lowering and p.places(mark)), None)
        if planned is None and not program.outputs[1]:
            return program
        if planned is None:
            clean = prepare(lowering, self.request.off)
            captures, loss_only = (Capture(clean(program), mark),), self.gradients == "loss"
            alone = Survey(captures, self.model, None, loss_only, lowering=lowering)
            planned = self.plans[mark] = self.adopt(alone, lowering)
            self.current = mark
        mine.append((planned, mark))
        return self.applied(program, planned, planned.places(mark)[0])

    def applied(self, program: Program, planned: Planned, place: int) -> Program:
        """The program as the plan wants it in one of its runs."""
        prepared = prepare(planned.lowering, self.request.off)(planned.named(program, place))
        changed = planned.applied(prepared, planned.remakes(place), planned.fences)
        dump_program(PLANNED, changed)
        return changed


def _better(one: PlanResult, other: PlanResult) -> bool:
    """Whether a plan fits where the other does not, is faster if both do, takes less if neither."""
    if one.infeasible != other.infeasible:
        return other.infeasible
    if one.infeasible:
        return one.plan.peak < other.plan.peak
    return one.step_seconds < (1 - SLOWED) * other.step_seconds
