"""From a captured model to a plan: photograph, price, propose, solve, certify; from a plan to the programs that run.

Order and duties (timing, verification, dumps) live here; passes, trades and solvers are plain functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import sqrt

import torch

from memopt.applied import apply_plan
from memopt.capture import Capture, Survey
from memopt.compose import whole_step, with_inputs, with_workspaces, without_outputs
from memopt.cost import CostModel, Measured, Roofline
from memopt.devices import Device
from memopt.dumps import CAPTURED, count, dump_program, passed
from memopt.edit import DISK, GRADIENT, HOST, Remake, edit
from memopt.errors import Binding, PlanFileError
from memopt.facts import storage_bytes
from memopt.fences import fenced
from memopt.fusion import Fences, Fused, expanded, fused, fused_seconds, unfused
from memopt.graph import StepGraph, Storage, TensorInfo
from memopt.joints import Part
from memopt.noise import Noise
from memopt.optim.photograph import OptimizerPhase, photograph_optimizer
from memopt.overlap import OVERLAP
from memopt.passbase import Rewrite, Trade
from memopt.passes import CLEANUPS, TRADES
from memopt.passes.few_bit import ApproxBP, FewBit
from memopt.passes.offload import OffloadDisk, OffloadHost
from memopt.planfile import PlanFile, check_identity
from memopt.plans import MAX_GRAD_ERROR, REUSED, Plan, Problem, Status, simulated
from memopt.prices import Meter, priced, unmeasured
from memopt.program import Program
from memopt.report import SCHEMA, PlanResult
from memopt.rewrites import left_alone, permitted, rewritten_levers
from memopt.seams import parts_of, runs_untraced
from memopt.solvers import solve
from memopt.solvers.moments import solve_overlapped
from memopt.timeline import at_peak, by_kind, peak
from memopt.units import format_size

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


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved. budget: bytes. passes: names switched off ("-recompute").

    accumulate: forwards and backwards per update. lowering: "eager" or "inductor", never "auto" here. host, disk: bytes
    that offloads may take there, and the codec of the pool they go to. max_grad_error: relative, of lossy levers
    together.
    """

    budget: int
    device: Device
    lowering: str
    model: str = "model"
    optimizer: torch.optim.Optimizer | None = None
    has_optimizer: bool = True
    numerics: str = "reordered"
    off: frozenset[str] = frozenset()
    accumulate: int = 1
    time_limit: float = 20.0
    host: tuple[int, str] = (0, "")
    disk: tuple[int, str] = (0, "")
    max_grad_error: float = MAX_GRAD_ERROR

    @property
    def limits(self) -> dict[str, float]:
        """What packing may take of resources besides memory and time."""
        return {
            GRADIENT: self.max_grad_error * self.max_grad_error,
            HOST: float(self.host[0]),
            DISK: float(self.disk[0]),
        }

    @property
    def rewrites(self) -> tuple[type[Rewrite], ...]:
        """Of the forward, those that may run: not switched off, and of no other rounding where it must be exact."""
        return permitted(self.numerics, self.off)

    @property
    def exact(self) -> bool:
        """Whether kernels are to be those of untraced torch on CPU (`memopt.lowering.lower`)."""
        return self.numerics == "exact" and self.device.kind == "cpu"


@dataclass(frozen=True)
class Planned:
    """result: what is shown. problem: what was solved, on the contracted graph.

    signatures, names: of the programs of the step's runs, in order (`Program.names`).
    lowered_released: as `PlanResult.lowered`, when the caller lets go of the outputs beside the loss. fences: how far
    the compiler is held to the plan's kernels.
    """

    result: PlanResult
    problem: Problem
    contracted: Fused
    signatures: tuple[str, ...]
    names: tuple[Mapping[str, str], ...]
    lowered_released: Mapping[str, int] = field(default_factory=dict)
    fences: Fences = Fences.FREE

    @cached_property
    def released(self) -> PlanResult:
        """The result when the caller drops the forward's outputs beside the loss before the backward begins."""
        before, after = (without_outputs(graph) for graph in (self.result.before, self.result.after))
        lowered = self.lowered_released
        plan = replace(self.result.plan, peak=max(lowered.values(), default=peak(after, self.result.block)))
        return replace(self.result, before=before, after=after, plan=plan, lowered=lowered)

    def missing(self, missed: int) -> Planned:
        """The plan when real steps were seen to take `missed` bytes more than predicted: added to every phase."""
        if not missed:
            return self
        result = self.result
        plan = replace(result.plan, peak=result.plan.peak + missed)
        phases = {name: size + missed for name, size in result.phases.items()}
        free = {name: size + missed for name, size in self.lowered_released.items()}
        lifted = replace(result, budget=result.budget + missed, plan=plan, lowered=phases)
        return replace(self, result=lifted, lowered_released=free)

    def places(self, signature: str) -> tuple[int, ...]:
        """Which runs of the step are of the graph with this signature; none if it is not part of the plan."""
        return tuple(place for place, known in enumerate(self.signatures) if known == signature)

    def named(self, program: Program, place: int) -> Program:
        """The program of this run, under the names of the plan."""
        return replace(program, prefix=_prefix(place), names=self.names[place])

    def remakes(self, place: int) -> tuple[Remake, ...]:
        """The remakes of this run."""
        return tuple(r for r in self.expanded(self.result.plan) if _owner(r.value) == _prefix(place))

    def decisions(self, place: int) -> tuple[tuple[str, ...], ...]:
        """What this run makes again and where: its steps and their reads. Equal for runs that may share their code."""
        prefix = _prefix(place)
        mine = [step for step in edit(self.whole, self.remakes(place)).steps if _owner(step.name) == prefix]
        own = (tuple(n.removeprefix(prefix) for n in (s.name, *s.reads) if _owner(n) == prefix) for s in mine)
        return tuple(own)

    @property
    def whole(self) -> StepGraph:
        """The graph of the real steps, which `expanded` remakes refer to."""
        return self.contracted.original

    def expanded(self, plan: Plan) -> tuple[Remake, ...]:
        """The plan's remakes as they are inserted: of the real steps, not the fused ones."""
        return expanded(self.contracted, plan.chosen)

    def applied(self, program: Program, remakes: Sequence[Remake], fences: Fences) -> Program:
        """One of the step's programs with its remakes inserted, verified, and the kernels' borders marked."""
        return fenced(apply_plan(program, self.whole, remakes), self.contracted, remakes, fences)


def _prefix(index: int) -> str:
    return f"g{index}/" if index else ""


def _owner(name: str) -> str:
    """The prefix of a step's or a value's name."""
    head, slash, _ = name.partition("/")
    return head + slash if slash and head[0] == "g" and head[1:].isdigit() else ""


def prepare(lowering: str, off: frozenset[str] = frozenset()) -> Callable[[Program], Program]:
    """The cleanups that hold for a lowering, in order, as one function. Inductor draws from seeds by itself."""
    chosen = [c for c in CLEANUPS if c.name not in off and not (lowering == "inductor" and c.name == "replay_random")]

    def run(program: Program) -> Program:
        dump_program(CAPTURED, program)
        for place, cleanup in enumerate(chosen, 1):
            started, before = time.perf_counter(), count(program)
            result = cleanup.run(program)
            program = result.program
            passed(place, cleanup.name, before, program, result.sites, time.perf_counter() - started)
        return program

    return run


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
    started = time.perf_counter()
    phase = optimizer_phase(survey, request)
    parts = parts_of(survey)
    whole = step_graph(survey, parts, request, phase, costs)
    contracted, seconds = _contracted(whole, request, costs)
    graph = contracted.graph
    remakes, brought = priced(graph, _proposals(graph, seconds, request), _cost_model(request, costs), costs.meter)
    seconds |= brought
    problem = Problem(graph, (), request.budget, seconds, request.device.allocator_block, request.limits)
    offers = noise.of(remakes, whole)
    problem = replace(problem, remakes=tuple(r for r in offers if plan_file or problem.allows((r,))))
    plan = _reused(problem, plan_file, survey) if plan_file else _solved(problem, request, progress)
    after = edit(graph, plan.chosen)
    plain, plain_seconds = _as_written(survey, request, phase, costs)
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
        timings={"capture": capture_seconds, "plan": time.perf_counter() - started, "lower": 0.0},
        binding=binding(after, request.device.allocator_block) if plan.status is Status.INFEASIBLE else None,
        classes={trade.name: trade.numerics.value for trade in TRADES},
        notes=(*_notes(survey, parts, phase, request), _priced(whole, costs, request.device)),
        rewrites=rewritten_levers(survey),
        plain=plain,
        plain_seconds=plain_seconds,
        identity=identity(survey),
        max_grad_error=request.max_grad_error,
    )
    signatures = tuple(capture.signature for capture in survey.captures)
    return Planned(result, problem, contracted, signatures, tuple(c.program.names for c in survey.captures))


def _solved(problem: Problem, request: Request, progress: Progress) -> Plan:
    progress("plan", None)
    overlaps = request.lowering == "eager" and OVERLAP not in request.off  # a compiler sets its own order
    return (solve_overlapped if overlaps else solve)(problem, time_limit=request.time_limit)


def _reused(problem: Problem, plan_file: PlanFile, survey: Survey) -> Plan:
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
    graphs = "-".join(capture.signature for capture in survey.captures)
    return {"graph": graphs, "torch": torch.__version__, "schema": str(SCHEMA)}


def step_graph(
    survey: Survey, parts: Sequence[Part], request: Request, phase: OptimizerPhase, costs: Costs
) -> StepGraph:
    """The photograph of the whole step: the captured programs, the optimizer, and what no program reads."""
    graph = whole_step(parts, phase, request.accumulate > 1)
    return with_workspaces(with_inputs(graph, [*_unread(survey), *_libraries(costs)]), costs.workspaces)


def _as_written(
    survey: Survey, request: Request, phase: OptimizerPhase, costs: Costs
) -> tuple[StepGraph | None, Mapping[str, float]]:
    """The step as the user wrote it, and its seconds; None where no rewrite changed it."""
    plain = survey.plain
    if plain is None:
        return None, {}
    contracted, seconds = _contracted(step_graph(plain, parts_of(plain), request, phase, costs), request, costs)
    return contracted.graph, seconds


def _contracted(whole: StepGraph, request: Request, costs: Costs) -> tuple[Fused, dict[str, float]]:
    """The step as the lowering runs it, and its seconds."""
    made = fused(whole) if request.lowering == "inductor" else unfused(whole)
    return made, fused_seconds(made, _seconds(whole, _cost_model(request, costs)))


def optimizer_phase(survey: Survey, request: Request) -> OptimizerPhase:
    """The optimizer's steps over the parameters that get a gradient."""
    if not request.has_optimizer:
        return OptimizerPhase((), {}, {}, (), ())
    trained = _trained(survey.captures)
    params = [(name, p) for name, p in survey.model.named_parameters() if name in trained]
    foreach = True if request.device.kind == "cuda" else None
    return photograph_optimizer(params, request.optimizer, foreach=foreach)


def _trained(captures: Sequence[Capture]) -> set[str]:
    """Names of the parameters that get a gradient."""
    found: set[str] = set()
    for program in (capture.program for capture in captures):
        holders = [n for n in program.graph.find_nodes(op="placeholder") if program.kinds.get(n.name) != "tangent"]
        for holder, gradient in zip(holders, program.outputs[1], strict=False):
            if gradient is not None and program.kinds.get(holder.name) == "parameter":
                found.add(program.name(holder))
    return found


def _unread(survey: Survey) -> Iterable[tuple[TensorInfo, Storage]]:
    """Parameters and buffers by name; those a program reads are declared already and skipped by `with_inputs`."""
    seen: set[int] = set()
    for kind, named in (("parameter", survey.model.named_parameters()), ("buffer", survey.model.named_buffers())):
        for name, tensor in named:
            key = tensor.untyped_storage()._cdata
            if key not in seen and tensor.device.type != "meta":
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield TensorInfo(name, tuple(tensor.shape), dtype, name), Storage(name, storage_bytes(tensor), kind)
            seen.add(key)


def _libraries(costs: Costs) -> Iterable[tuple[TensorInfo, Storage]]:
    """What libraries hold throughout, as one more buffer."""
    if costs.libraries:
        name = "workspaces of libraries"
        yield TensorInfo(name, (costs.libraries,), "uint8", name), Storage(name, costs.libraries, "buffer")


def _cost_model(request: Request, costs: Costs) -> CostModel:
    model: CostModel = Roofline(request.device)
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


def binding(graph: StepGraph, block: int) -> Binding:
    """The step that sets the peak of this graph, with its bytes by kind."""
    snapshot = at_peak(graph, block)
    step = graph.steps[snapshot.position]
    return Binding(step.name, step.op, step.source, snapshot.bytes, tuple(by_kind(graph, snapshot).items()))


def _notes(survey: Survey, parts: Sequence[Part], phase: OptimizerPhase, request: Request) -> tuple[str, ...]:
    notes = [*survey.notes, *left_alone(survey), *([phase.assumed] if phase.assumed else [])]
    if request.lowering == "inductor":
        slopes = (trade.name for trade in (FewBit, ApproxBP) if trade.name not in request.off)
        why = 'under Inductor, which takes nonlinearities apart: lowering="eager"'
        notes += [f"{name} finds nothing {why}" for name in slopes]
    if len(survey.captures) > 1:
        notes.append(f"the model breaks into {len(survey.captures)} graphs; one budget is shared among them")
    if runs_untraced(parts):
        notes.append(
            "between its graphs the model runs untraced operations; what they hold by themselves is not planned"
        )
    return tuple(notes)


def _priced(graph: StepGraph, costs: Costs, device: Device) -> str:
    """Where seconds and workspaces come from: the same step priced otherwise may get another plan."""
    keys = {step.key for step in graph.steps if step.key and graph.created(step) and step.phase != "optimizer"}
    known = len(keys & costs.seconds.keys())
    if known == len(keys):
        return "seconds and workspaces of operations: measured on this device"
    return (
        f"seconds of operations: {known} of {len(keys)} kinds measured on this device, the others by the roofline of "
        f"{device.name}; what those take inside themselves (workspaces) is not counted"
    )


def silent(stage: str, fraction: float | None) -> None:
    """The progress callback of callers who want none."""
