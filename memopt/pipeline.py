"""From a captured model to a plan: photograph, price, propose, solve, certify; from a plan to the programs that run.

Order and duties (timing, verification, dumps) live here; passes, trades and solvers are plain functions.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.optim import Optimizer

from memopt.capture import Survey
from memopt.compose import whole_step, with_inputs, with_workspaces
from memopt.cost import CostModel, Measured, Roofline
from memopt.dumps import CAPTURED, count, dump_program, passed
from memopt.early import anchors, overtaken
from memopt.edit import DISK, HOST, Remake, edit
from memopt.fusion import Fused, fused, fused_seconds, unfused
from memopt.garbage import collected_later
from memopt.graph import StepGraph
from memopt.joints import Part
from memopt.noise import Noise
from memopt.optim.moved import GRADIENTS, PLACES
from memopt.optim.photograph import WHOLE, OptimizerPhase
from memopt.optim.portions import Update
from memopt.optim.precision import obstacle
from memopt.optim.sharded import Sharded
from memopt.overlap import OVERLAP, moves
from memopt.passbase import Trade
from memopt.passes import CLEANUPS, TRADES
from memopt.passes.offload import OffloadDisk, OffloadHost
from memopt.planfile import PlanFile
from memopt.planned import Planned
from memopt.plans import Plan, Problem, Status
from memopt.prices import Meter, priced, unmeasured
from memopt.program import Program
from memopt.remarks import binding, priced_by, remarks, sharing
from memopt.report import PlanResult
from memopt.request import Request
from memopt.reused import identity, reused
from memopt.rewrites import rewritten_levers
from memopt.runtime import disk
from memopt.seams import parts_of
from memopt.solvers import solve
from memopt.solvers.overlapped import solve_overlapped
from memopt.trained import (
    affordable,
    candidates,
    fitting,
    gradients_there,
    hindrance,
    states_there,
    throughout,
    unread,
    update_phase,
)

Progress = Callable[[str, float | None], None]
UNMEASURED = Noise()


@dataclass(frozen=True)
class Costs:
    """What is known of operations by key, measured on the device: seconds and workspace bytes. Empty: the roofline.

    libraries: bytes that libraries hold throughout (memopt.runtime.libraries). meter: of steps that trades bring along.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    workspaces: Mapping[str, int] = field(default_factory=dict)
    libraries: int = 0
    meter: Meter = unmeasured


def prepare(lowering: str, off: frozenset[str] = frozenset()) -> Callable[[Program], Program]:
    """The cleanups that hold for a lowering, in order, as one function. Inductor draws from seeds by itself."""
    chosen = [cleanup for cleanup in CLEANUPS if cleanup.name not in off and lowering in cleanup.lowerings]

    def run(program: Program) -> Program:
        dump_program(CAPTURED, program)
        for place, cleanup in enumerate(chosen, 1):
            started, before = time.perf_counter(), count(program)
            result = cleanup.run(program)
            program = result.program
            passed(place, cleanup.name, before, program, result.sites, time.perf_counter() - started)
        return program

    return run


@collected_later()
def make_plan(
    survey: Survey,
    request: Request,
    costs: Costs,
    capture_seconds: float,
    progress: Progress,
    plan_file: PlanFile | None = None,
    noise: Noise = UNMEASURED,
) -> Planned:
    """Plan the surveyed step within the request's budget. An infeasible step gives a Planned with that status.

    plan_file: reuse its decisions instead of solving; PlanFileError if it was made for another step. noise: of lossy
    levers, as far as it was measured.
    """

    def made(optimizer: Optimizer | None) -> Planned:
        asked = replace(request, optimizer=optimizer)
        make = _Maker(survey, asked, costs, capture_seconds, progress, plan_file, noise)
        planned = make.exact()
        return make.lossy(planned) if planned.result.infeasible and request.states else planned

    return _shared(request.optimizer, made) if isinstance(request.optimizer, Sharded) else made(request.optimizer)


def _shared(optimizer: Sharded, made: Callable[[Sharded], Planned]) -> Planned:
    """The plan in which as few ranks share the optimizer's state as takes no further seconds: the fewer, the less is
    sent beyond neighbours, and in all as much (`Sharded.traffic`)."""
    most, *fewer = optimizer.sharings()
    best = replace(made(optimizer.shared_by(most)), shards=most)
    for ranks in fewer:
        other = replace(made(optimizer.shared_by(ranks)), shards=ranks)
        if other.result.infeasible or other.result.plan.seconds > best.result.plan.seconds:
            break
        best = other
    return best


@dataclass
class _Maker:
    """What plans of one step, updated in different ways, have in common."""

    survey: Survey
    request: Request
    costs: Costs
    capture_seconds: float
    progress: Progress
    plan_file: PlanFile | None
    noise: Noise

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.parts = parts_of(self.survey)

    def phase(self, update: Update) -> OptimizerPhase:
        return optimizer_phase(self.survey, self.request, update)

    def step(self, update: Update) -> tuple[OptimizerPhase, StepGraph]:
        phase = self.phase(update)
        return phase, step_graph(self.survey, self.parts, self.request, phase, self.costs)

    def exact(self) -> Planned:
        """The plan with the optimizer's own arithmetic: at once, in portions, or by consent in backward."""
        phase, whole = self.step(WHOLE)
        request, device = self.request, self.request.device
        portion = affordable(whole, self.phase, request.optimizer, request.budget, device.allocator_block)
        planned = _planned(self, WHOLE, phase, whole) if portion is None else self.planned(Update(portion))
        if planned.result.infeasible and request.update == "backward":
            planned = self.in_backward(planned)
        return self.elsewhere(planned) if planned.result.infeasible else planned

    def elsewhere(self, refused: Planned) -> Planned:
        """The plan with the optimizer's state in the host's memory or on disk, of no more parameters than must be; what
        was refused, where that does not fit either and takes less."""
        planned = self.first(self.moves(refused), refused)
        return self.first(self.moved_gradients(planned), planned) if planned.result.infeasible else planned

    def first(self, updates: Iterable[Update], refused: Planned) -> Planned:
        """The first plan that fits with one of these updates, else the one that takes least."""
        least = refused
        for update in updates:
            planned = self.planned(update)
            if planned.result.infeasible and self.request.update == "backward":
                planned = self.in_backward(planned)
            least = min(least, planned, key=lambda one: one.result.plan.peak)
            if not planned.result.infeasible:
                return planned
        return least

    def moves(self, refused: Planned) -> Iterator[Update]:
        """Updates with ever more states elsewhere: as many of the largest as the refused plan exceeds the budget by,
        twice as many, and all that there is room for."""
        phase, over = self.phase(WHOLE), refused.result.plan.peak - self.request.budget
        pools = (self.request.host, HOST), (self.request.disk, DISK)
        for limit, codec in (pool for pool, kind in pools if pool[0] and PLACES[kind] not in self.request.off):
            sizes = states_there(phase, self.request.optimizer, codec)
            names, total = fitting(sizes, limit)
            if not names:
                continue
            some = bisect_left(total, over + total[0]) + 1  # what is updated is there besides
            for number in (*(number for number in (some, 2 * some) if number < len(names)), len(names)):
                yield Update(1, moved=frozenset(names[:number]), pool=codec, there=total[number - 1])

    def moved_gradients(self, refused: Planned) -> Iterator[Update]:
        """Updates with ever more gradients elsewhere besides; none where the backward may consume them."""
        request, over = self.request, refused.result.plan.peak - self.request.budget
        if request.lowering != "eager" or len(self.survey.captures) != 1 or refused.update.in_backward:
            return
        pools = (request.host, HOST), (request.disk, DISK)
        for limit, codec in (pool for pool, kind in pools if pool[0] and GRADIENTS[kind] not in request.off):
            if refused.update.pool not in ("", codec):
                continue
            sizes = gradients_there(self.survey, self.parts[0], request.optimizer, codec)
            names, total = fitting(sizes, limit - refused.update.there)
            some = bisect_left(total, over) + 1
            for number in (*(number for number in (some, 2 * some) if number < len(names)), len(names)):
                if number:
                    there = refused.update.there + total[number - 1]
                    yield replace(refused.update, gradients=frozenset(names[:number]), pool=codec, there=there)

    def lossy(self, refused: Planned) -> Planned:
        """The first plan that fits with moments in fewer bits, of the ways allowed; else the one that takes least."""
        if why := obstacle(self.request.optimizer):
            return refused.noted(f"the optimizer's moments cannot be stored in fewer bits: {why}")
        return self.first((Update(state=state) for state in self.request.states), refused)

    def in_backward(self, refused: Planned) -> Planned:
        """The plan with parameters updated in the backward: all that can be, but for those that a plan reads again
        after their update."""
        request, optimizer = self.request, self.request.optimizer
        if why := hindrance(self.survey, optimizer, request.lowering, request.accumulate):
            return refused.noted(f"parameters cannot be updated in the backward: {why}")
        assert optimizer is not None
        early = candidates(self.survey, self.parts[0], optimizer)
        while early:
            portion = self.portion_of_the_rest(refused, early)
            update = replace(refused.update, portion=portion, in_backward=early)
            planned = self.planned(replace(update, order=self.order(early)) if update.moved else update)
            late = overtaken(planned.result.after, early)
            if not late:
                return planned
            early -= late
        return refused

    def order(self, early: frozenset[str]) -> tuple[str, ...]:
        """These parameters as the backward updates them."""
        return tuple(anchors(self.step(Update(None, early))[1], early))

    def portion_of_the_rest(self, refused: Planned, early: frozenset[str]) -> int | None:
        """In what portions the others are updated, if there are any."""
        others = any(sent.target.startswith("grad:") for sent in self.parts[0].sent if sent.target[5:] not in early)
        return refused.update.portion if others or refused.update.moved else None

    def planned(self, update: Update) -> Planned:
        """The plan of the step that is updated so."""
        return _planned(self, update, *self.step(update))

    def left(self, update: Update) -> Request:
        """The request when the optimizer's state takes its share of what may lie elsewhere."""
        host, there = self.request.host, self.request.disk
        if update.pool.startswith(HOST):
            return replace(self.request, host=(host[0] - update.there, host[1]))
        return replace(self.request, disk=(there[0] - update.there, there[1])) if update.pool else self.request


def _planned(make: _Maker, update: Update, phase: OptimizerPhase, whole: StepGraph) -> Planned:
    survey, request, costs, plan_file = make.survey, make.left(update), make.costs, make.plan_file
    contracted, seconds = _contracted(whole, request, costs)
    graph = contracted.graph
    remakes, brought = priced(graph, _proposals(graph, seconds, request), _cost_model(request, costs), costs.meter)
    seconds |= brought
    problem = Problem(graph, (), request.budget, seconds, request.device.allocator_block, request.limits)
    offers = make.noise.of(remakes, whole)
    problem = replace(problem, remakes=tuple(r for r in offers if plan_file or problem.allows((r,))))
    plan = reused(problem, plan_file, survey) if plan_file else _solved(problem, request, make.progress)
    after = edit(graph, plan.chosen)
    plain, plain_seconds = _as_written(make, update)
    result = PlanResult(
        model=request.model,
        device=request.device.name,
        budget=request.budget,
        block=request.device.allocator_block,
        before=graph,
        after=after if plan.status is not Status.INFEASIBLE else graph,
        plan=plan,
        seconds=seconds,
        breaks=len(survey.captures) - 1,
        timings={"capture": make.capture_seconds, "plan": time.perf_counter() - make.started, "lower": 0.0},
        binding=binding(after, request.device.allocator_block) if plan.status is Status.INFEASIBLE else None,
        classes={trade.name: trade.numerics.value for trade in TRADES},
        notes=(
            *remarks(survey, make.parts, phase, request, update),
            *sharing(survey.model, after),
            priced_by(whole, costs.seconds.keys(), request.device),
        ),
        rewrites=rewritten_levers(survey),
        plain=plain,
        plain_seconds=plain_seconds,
        identity=identity(survey),
        max_grad_error=request.max_grad_error,
    )
    signatures = tuple(capture.signature for capture in survey.captures)
    names = tuple(c.program.names for c in survey.captures)
    return Planned(
        result, problem, contracted, signatures, names, update=update, lowering=request.lowering, chunks=survey.chunks,
        overlaps=OVERLAP not in request.off and any(map(moves, problem.remakes)),
    )  # fmt: skip


def _solved(problem: Problem, request: Request, progress: Progress) -> Plan:
    progress("plan", None)
    solver = solve if OVERLAP in request.off else solve_overlapped
    return solver(problem, time_limit=request.time_limit, quick=request.quick)


def step_graph(
    survey: Survey, parts: Sequence[Part], request: Request, phase: OptimizerPhase, costs: Costs
) -> StepGraph:
    """The photograph of the whole step: the captured programs, the optimizer, and what no program reads."""
    graph = whole_step(parts, phase, request.accumulate > 1)
    return with_workspaces(
        with_inputs(graph, [*unread(survey), *throughout(survey, costs.libraries)]), costs.workspaces
    )


def _as_written(make: _Maker, update: Update) -> tuple[StepGraph | None, Mapping[str, float]]:
    """The step as the user wrote it, and its seconds; None where neither its forward nor its update is another one."""
    request, costs = make.request, make.costs
    plain = make.survey.plain or (None if update == WHOLE else make.survey)
    if plain is None:
        return None, {}
    phase = optimizer_phase(plain, request)
    contracted, seconds = _contracted(step_graph(plain, parts_of(plain), request, phase, costs), request, costs)
    return contracted.graph, seconds


def _contracted(whole: StepGraph, request: Request, costs: Costs) -> tuple[Fused, dict[str, float]]:
    """The step as the lowering runs it, and its seconds."""
    made = fused(whole) if request.lowering == "inductor" else unfused(whole)
    return made, fused_seconds(made, _seconds(whole, _cost_model(request, costs)))


def optimizer_phase(survey: Survey, request: Request, update: Update = WHOLE) -> OptimizerPhase:
    """The optimizer's steps over the parameters that get a gradient; none where it is not planned for."""
    if not request.has_optimizer:
        return OptimizerPhase((), {}, {}, (), ())
    return update_phase(survey, request.optimizer, request.device.kind, update)


def _cost_model(request: Request, costs: Costs) -> CostModel:
    rates = disk.pool_of(request.disk[1]).rates() if request.disk[1] else None
    model: CostModel = Roofline(request.device, None if rates is None else (rates.write, rates.read))
    return Measured(costs.seconds, model) if costs.seconds else model


def _seconds(graph: StepGraph, model: CostModel) -> dict[str, float]:
    return {step.name: model.seconds(graph, step) for step in graph.steps}


def _proposals(graph: StepGraph, seconds: Mapping[str, float], request: Request) -> tuple[Remake, ...]:
    placed: dict[type[Trade], Trade] = {
        OffloadHost: OffloadHost(request.host[1]),
        OffloadDisk: OffloadDisk(request.disk[1]),
    }
    offered = [placed.get(trade) or trade() for trade in TRADES if trade.name not in request.off]
    return tuple(remake for trade in offered for remake in trade.propose(graph, seconds))


def silent(stage: str, fraction: float | None) -> None:
    """The progress callback of callers who want none."""
