"""A compiled model at work: plan each new shape of input before it runs, run it by the plan, watch that it holds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from memopt.capture import Capture, Survey, dynamo_set, entry, survey, tensor_names
from memopt.dumps import PLANNED, dump_program, plan_made
from memopt.errors import MemoptError
from memopt.hosts import as_in_eager, without_full_mask
from memopt.lowering import Transform, lower, signature
from memopt.pipeline import Costs, Planned, Progress, Request, make_plan, prepare, silent
from memopt.planfile import PlanFile
from memopt.plans import MeasuredStep
from memopt.profiling import measured_costs
from memopt.program import Program, copied
from memopt.refusal import Call, Refused, Spelling, infeasible
from memopt.report import PlanResult
from memopt.runtime.guard import Guard
from memopt.runtime.resident import resident_tensors
from memopt.seams import parts_of
from memopt.table import to_text
from memopt.units import format_size
from memopt.unwrapped import unwrapped

log = logging.getLogger("memopt")

CORRECTIONS = 2  # times a step that broke the budget is planned again


@dataclass
class Session:
    """State behind one compiled model. request: what was asked; its budget is already in bytes.

    measure: price operations by running each once on this device; False where nothing may be allocated. advise: find
    the ways out of a refusal, which takes further plans; spelling: how they are written. missed: bytes by which real
    steps exceeded what was predicted of them; corrections: how often that led to another plan.
    """

    model: nn.Module
    request: Request
    gradients: str = "loss"
    plan_file: PlanFile | None = None
    progress: Progress = silent
    measure: bool = True
    plans: dict[Any, Planned] = field(default_factory=dict)
    surveys: dict[Any, Survey] = field(default_factory=dict)
    latest: Planned | None = None
    guard: Guard | None = None
    outputs_held: bool = True
    refused: PlanResult | None = None
    inputs: Any = ()
    advise: bool = True
    spelling: Spelling = field(default_factory=Spelling)
    missed: int = 0
    corrections: int = 0
    turns: dict[str, int] = field(default_factory=dict)

    def plan_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Planned:
        """The plan for inputs of these shapes: made at first sight, under fake tensors. Raises BudgetError."""
        kwargs = without_full_mask(self.model, kwargs)
        key = input_key(self.model, args, kwargs)
        if key not in self.plans:
            started = time.perf_counter()
            self.progress("capture", None)
            call = tuple(args), dict(kwargs)
            found = self.capture(call)
            captured = time.perf_counter() - started
            self.plans[key] = self.adopt(found, captured, call)
            self.surveys[key] = found
        return self.plans[key]

    def capture(self, call: Call) -> Survey:
        """Every graph of the step for these inputs. Raises CaptureError."""
        clean = prepare(self.request.lowering, self.request.off)
        return survey(self.model, *call, clean, self.request.lowering, self.gradients, self.request.exact)

    def adopt(self, found: Survey, capture_seconds: float, call: Call | None = None) -> Planned:
        """Price and plan a survey; remember it as the latest. Raises BudgetError; call: inputs it may try halved."""
        costs = self.costs(found)
        request = replace(self.request, budget=max(self.request.budget - self.missed, 1))
        planned = make_plan(found, request, costs, capture_seconds, self.progress, self.plan_file)
        if self.request.lowering == "inductor" and self.measure:
            from memopt.tuning import tuned  # loads Inductor

            runs = tuple(zip((capture.program for capture in found.captures), parts_of(found), strict=True))
            planned = tuned(planned, runs, self.request.time_limit, self.request.device.kind)
        planned = planned.missing(self.missed)
        if planned.result.infeasible:
            self.refused = self.advised(planned.result, found, costs, call)
            raise infeasible(self.refused)
        self.latest = planned
        self.guard = Guard(planned.result.plan.peak, log, resident=self.resident, device=self.request.device.kind)
        plan_made(lambda: to_text(planned.result), planned.result.to_json)
        return planned

    def advised(self, result: PlanResult, found: Survey, costs: Costs, call: Call | None) -> PlanResult:
        """The refused result with its ways out, unless nobody will read them."""
        if not self.advise:
            return result
        self.progress("ways out", None)
        refused = Refused(result, found, self.request, costs, call, self.capture, self.spelling)
        return replace(result, ways_out=refused.ways_out())

    def begin_step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Let the guard watch; True if what it saw of the step before calls for another plan."""
        if self.guard is None:
            return False
        self.inputs = (args, kwargs)
        self.guard.begin_step()
        self.inputs = ()
        return self.correct()

    def correct(self) -> bool:
        """Whether the latest measured step broke the budget: then plan again with what it exceeded set aside."""
        measured = self.guard.measured if self.guard else None
        if measured is None or self.result is None or self.corrections == CORRECTIONS:
            return False
        if measured.peak_bytes <= self.request.budget:
            return False
        self.missed += measured.peak_bytes - self.result.peak
        self.corrections += 1
        self.plans.clear()
        took, budget = format_size(measured.peak_bytes), format_size(self.request.budget)
        log.warning("a step took %s of %s: planning again", took, budget)
        return True

    def costs(self, found: Survey) -> Costs:
        """Seconds and workspaces of the operations on this device; none when it is not here."""
        return measured_costs([capture.program for capture in found.captures], self.request.device, self.measure)

    def resident(self) -> Iterable[torch.Tensor]:
        """What is alive before a step: the model, gradients being accumulated, optimizer state, the inputs."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return resident_tensors(self.model, self.request.optimizer, gradients, self.inputs)

    def backend(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The Dynamo backend: differentiate, insert the plan's remakes, lower.

        A graph that runs several times in a step (for each layer of a loop that breaks) is lowered once for every
        set of decisions the plan has for its runs.
        """
        started = time.perf_counter()
        spare = fx.GraphModule(module, copied(module.graph))
        mine: list[tuple[Planned, str]] = []
        run = self.lowered(module, inputs, lambda program: self.transform(program, mine))
        if mine and len(mine[0][0].places(mine[0][1])) > 1:
            run = self.dispatched(run, spare, inputs, *mine[0])
        if self.latest is not None:
            timings = {**self.latest.result.timings, "lower": time.perf_counter() - started}
            self.latest = replace(self.latest, result=replace(self.latest.result, timings=timings))
        return run

    def lowered(self, module: fx.GraphModule, inputs: Sequence[Any], transform: Transform) -> Callable[..., Any]:
        loss_only = self.gradients == "loss" and all(found.loss_only for found in self.surveys.values())
        names, request = tensor_names(self.model), self.request
        return lower(module, inputs, names, transform, request.lowering, False, loss_only, self.seen, request.exact)

    def dispatched(
        self, first: Callable[..., Any], spare: fx.GraphModule, inputs: Sequence[Any], planned: Planned, mark: str
    ) -> Callable[..., Any]:
        """The graph lowered for each of its runs in a step; a call goes to the one whose turn it is."""
        places = planned.places(mark)
        made = {planned.decisions(places[0]): first}
        for place in places[1:]:
            if (decided := planned.decisions(place)) not in made:
                twin = fx.GraphModule(spare, copied(spare.graph))
                made[decided] = self.lowered(twin, inputs, lambda p, place=place: self.applied(p, planned, place))  # type: ignore[misc]
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
        if self.latest is None or self.outputs_held:
            return None if self.latest is None else self.latest.result
        return self.latest.released

    def transform(self, program: Program, mine: list[tuple[Planned, str]]) -> Program:
        """The program the plan asks for. A graph no survey saw is planned by itself, within the whole budget.

        mine: gets the plan the program is part of, and its signature.
        """
        mark = signature(program)
        planned = next((p for p in reversed(self.plans.values()) if p.places(mark)), None)
        if planned is None and not program.outputs[1]:
            return program
        if planned is None:
            clean = prepare(self.request.lowering, self.request.off)
            alone = Survey((Capture(clean(program), mark),), self.model, None, self.gradients == "loss")
            planned = self.plans[mark] = self.adopt(alone, 0.0)
        mine.append((planned, mark))
        return self.applied(program, planned, planned.places(mark)[0])

    def applied(self, program: Program, planned: Planned, place: int) -> Program:
        """The program as the plan wants it in one of its runs."""
        prepared = prepare(self.request.lowering, self.request.off)(planned.named(program, place))
        changed = planned.applied(prepared, planned.remakes(place), planned.fences)
        dump_program(PLANNED, changed)
        return changed


def input_key(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Equal for calls that trace to the same graphs: structure, shapes, dtypes, training mode, what is frozen."""
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    shapes = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)
    frozen = tuple(parameter.requires_grad for parameter in model.parameters())
    autocast = tuple(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    return str(spec), shapes, model.training, frozen, autocast


class Handle:
    """What `model.memopt` offers. A copied or unpickled model is not compiled: its handle has no session."""

    def __init__(self, session: Session | None) -> None:
        self._session = session

    def __reduce__(self) -> Any:
        return Handle, (None,)

    @property
    def plan(self) -> PlanResult | None:
        """The plan of the latest shape seen; None before the first training step."""
        result = self._session.result if self._session else None
        return None if result is None else replace(result, measured=self.measured)

    @property
    def measured(self) -> MeasuredStep | None:
        """The latest step the guard measured."""
        return self._session.guard.measured if self._session and self._session.guard else None

    def report(self) -> str:
        """The plan, and what was measured, as text."""
        if self._session is None:
            raise MemoptError("this model is a copy of a compiled one and runs uncompiled; call memopt.compile on it")
        if self.plan is None:
            raise MemoptError("no plan yet: it is made at the first training step, when the shapes are known")
        return to_text(self.plan)


def _compiled(session: Session) -> Callable[..., Any]:
    """The model behind a new code object: what Dynamo compiled of an earlier one is not found again."""
    return torch.compile(entry(session.model), backend=unwrapped(session.backend), dynamic=False)


def attach(session: Session) -> nn.Module:
    """Compile the session's model in place: same module, same state_dict keys; inference runs as it did."""
    model = session.model
    plain: Callable[..., Any] = model._call_impl
    compiled = _compiled(session)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or os.environ.get("MEMOPT_DISABLE") == "1":
            return plain(*args, **kwargs)
        nonlocal compiled
        kwargs = without_full_mask(model, kwargs)
        session.plan_for(args, kwargs)
        if session.begin_step(args, kwargs):
            compiled = _compiled(session)
            session.plan_for(args, kwargs)
        session.turns.clear()
        with dynamo_set(), as_in_eager(kwargs):
            return compiled(*args, **kwargs)

    model._compiled_call_impl = call
    model.memopt = Handle(session)  # type: ignore[assignment]
    return model
