"""A compiled model at work: plan each new shape of input before it runs, run it by the plan, watch that it holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from memopt.agreement import agreed, together
from memopt.capture import Capture, Survey, tensor_names
from memopt.coded import ROUNDED, with_bytes
from memopt.dumps import PLANNED, dump_program, dump_text
from memopt.early import Updates, anchors
from memopt.emission import kernels_of
from memopt.errors import BudgetError
from memopt.gathered import group_of, localized
from memopt.hosts import without_full_mask
from memopt.kernels.generated import KERNELS
from memopt.lighter import LighterPlanner
from memopt.local import local
from memopt.lowering import Transform, lower, signature
from memopt.optim.stepper import Stepper, watched
from memopt.pipeline import prepare
from memopt.planfile import PlanFile
from memopt.planned import Planned
from memopt.program import Program, copied
from memopt.report import PlanResult
from memopt.runtime.resident import resident_tensors
from memopt.shapes import input_key
from memopt.smaller import Call
from memopt.units import format_size
from memopt.watch import StepWatch

log = logging.getLogger("memopt")

CORRECTIONS = 2  # times a step that broke the budget is planned again


@dataclass
class Session(LighterPlanner):
    """State behind one compiled model. plans: by what `input_key` gives; current: the key of the latest step.

    corrections: how often a step that broke the budget led to another plan. shards: by name, of sharded parameters what
    is here.
    """

    plans: dict[Any, Planned] = field(default_factory=dict)
    current: Any = None
    outputs_held: bool = True
    inputs: Any = ()
    corrections: int = 0
    turns: dict[str, int] = field(default_factory=dict)

    shards: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.request.optimizer is not None and ROUNDED in dict(self.request.weights).values():
            with_bytes(self.request.optimizer)  # a checkpoint may be loaded before the first step
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
            make = partial(self.by_file, key, (tuple(args), dict(kwargs)))
            planned = agreed(self.group, self.request.optimizer, self.plan_file, make)
            self.settle()
            if self.stepper is not None and self.measure:
                self.stepper.know(self.model.parameters())
            key = input_key(self.model, args, kwargs)  # another one, if frozen weights were packed
            self.plans[key] = planned
        self.current = key
        return self.plans[key]

    def by_file(self, key: Any, call: Call, plan_file: PlanFile | None) -> Planned:
        """As `chosen`, by this saved plan."""
        given, self.plan_file = self.plan_file, plan_file
        try:
            return self.chosen(key, call)
        finally:
            self.plan_file = given

    def step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """A training step begins: have its plan ready and watch it. True if plans were made anew.

        Raises BudgetError at the first sight of inputs that do not fit; what already runs is never stopped by one.
        """
        self.watch.end()
        anew = self.exceeded() and self.replanned(args, kwargs)
        planned = self.plan_for(args, kwargs)
        if self.stepper is not None:
            self.stepper.follow(planned.update, dict(self.model.named_parameters()))
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
        if self.group is not None:  # a rank does not plan without the others
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
        module, inputs, wrapped = localized(module, inputs, self.shard)
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
        return wrapped(run)

    @property
    def group(self) -> Any:
        """The process group of the ranks that take part in a step; None where there are no others."""
        return group_of(self.model) or together(self.request.optimizer)

    def shard(self, p: nn.Parameter) -> nn.Parameter:
        """What is here of a sharded parameter, which shares its memory."""
        name, here = tensor_names(self.model)[id(p)], local(p)
        known = self.shards.get(name)
        if known is None or (known.data_ptr(), known.requires_grad) != (here.data_ptr(), p.requires_grad):
            known = self.shards[name] = nn.Parameter(here, requires_grad=p.requires_grad)
        return known

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
        names = tensor_names(self.model) | {id(p): name for name, p in self.shards.items()}
        exact, rewrites = self.request.exact, self.request.without(left_out)
        return lower(
            module, inputs, names, transform, lowering, False, loss_only, self.seen, exact, rewrites, updates=updates,
            chunks=chunks,
        )  # fmt: skip

    def early(self, mine: Sequence[tuple[Planned, str]]) -> Updates:
        """What the backward of the graph is to update by its plan, and how."""
        if not mine or self.stepper is None:
            return {}
        planned, params = mine[0][0], dict(self.model.named_parameters())
        early = planned.update.in_backward
        away = frozenset(name for name in planned.update.gradients if not watched(params[name]))  # since it was planned
        call = {name: self.stepper.consumer(name, params[name]) for name in early}
        call |= {name: self.stepper.mover(name, params[name]) for name in away}
        return {name: (step, call[name]) for name, step in anchors(planned.running, early | away).items()}

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
        for key in kernels_of(changed):
            dump_text(f"kernels/{key}.py", lambda key=key: KERNELS[key].source.text)  # type: ignore[misc]
        return changed
