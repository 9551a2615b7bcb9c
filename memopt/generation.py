"""A plan with fused regions as kernels of their own: which, and what the step takes with them.

In the eager lowering all that move fewer bytes than their steps one by one; in Inductor's code, which fuses by itself,
those that move fewer than its kernels would.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from memopt.compose import without_outputs
from memopt.devices import Device
from memopt.early import overtaken
from memopt.edit import Remake, edit
from memopt.emission import beating_inductor, regions
from memopt.fusion import Fences
from memopt.graph import StepGraph
from memopt.merged import Region, harmless, merged, standing
from memopt.planned import Planned
from memopt.plans import Plan
from memopt.program import Program
from memopt.report import Lever
from memopt.timeline import phase_peaks
from memopt.tuning import Phases, tuned
from memopt.units import format_size

if TYPE_CHECKING:
    from memopt.request import Request

KERNELS = "generated_kernels"


def wanted(passes: str, device: Device, numerics: str, off: frozenset[str]) -> bool:
    """Whether regions are to become kernels: on a GPU, unless that is switched off or all must be exact; elsewhere only
    when asked for by name ("+generated_kernels") and Triton interprets: else a kernel is the region's own operations,
    and holds what they make."""
    by_name = f"+{KERNELS}" in {word.strip() for word in passes.split(",")}
    possible = numerics != "exact" and KERNELS not in off and find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return possible and (device.kind == "cuda" or (by_name and interpreted))


def with_kernels(planned: Planned, programs: Sequence[Program], request: Request, search: bool) -> Planned:
    """The plan that holds the budget with its regions as kernels. programs: of the step's runs, in order. search: as of
    `memopt.tuning.tuned`."""
    step = _Step(planned, programs)
    made = tuned(planned, lambda plan, _: step.peaks(plan), request.time_limit, search, Fences.FREE)
    kernels = step.kernels(made.result.plan)
    return made if made.result.infeasible else replace(_counted(made, step, kernels), kernels=kernels)


def with_kernels_beside(planned: Planned, programs: Sequence[Program]) -> Planned:
    """The plan, whose code has kernels of ours, with what they are."""
    step = _Step(planned, programs)
    found = step.each(planned.result.plan, beating_inductor)
    return planned if planned.result.infeasible else _counted(planned, step, found)


def _counted(planned: Planned, step: _Step, kernels: Sequence[Region]) -> Planned:
    """The plan with its kernels among the levers and the notes."""
    if not kernels:
        return planned
    result = replace(planned.result, kernels=(_lever(step.whole(planned.result.plan), kernels),))
    return replace(planned, result=result).noted(_told(kernels))


@dataclass
class _Step:
    """One step, planned in several ways. found: the kernels of each, by its remakes."""

    planned: Planned
    programs: Sequence[Program]
    found: dict[tuple[Remake, ...], tuple[Region, ...]] = field(default_factory=dict)

    def whole(self, plan: Plan) -> StepGraph:
        """The step after the plan's remakes, without kernels."""
        return edit(self.planned.whole, self.planned.expanded(plan))

    def kernels(self, plan: Plan) -> tuple[Region, ...]:
        """The regions with which the plan's step takes no more than without."""
        if plan.chosen not in self.found:
            self.found[plan.chosen] = self._kernels(plan)
        return self.found[plan.chosen]

    def each(self, plan: Plan, find: Callable[[Program], tuple[Region, ...]]) -> list[Region]:
        """What is found in the programs of all runs, with the plan's remakes."""
        made = replace(self.planned, result=replace(self.planned.result, plan=plan), beside=False)
        changed = (made.applied(program, made.remakes(at), Fences.FREE) for at, program in enumerate(self.programs))
        return [region for program in changed for region in find(program)]

    def _kernels(self, plan: Plan) -> tuple[Region, ...]:
        whole = self.whole(plan)
        kept = harmless(whole, self.each(plan, regions), self.planned.problem.block)
        early = self.planned.update.in_backward
        late = overtaken(merged(whole, kept), early) if early else frozenset()
        return tuple(standing(whole, [region for region in kept if late.isdisjoint(region.reads)]))

    def peaks(self, plan: Plan) -> tuple[Phases, Phases]:
        """Peak bytes of each phase with the kernels, with the outputs held and released."""
        after, block = merged(self.whole(plan), self.kernels(plan)), self.planned.problem.block
        return phase_peaks(after, block), phase_peaks(without_outputs(after), block)


def _lever(graph: StepGraph, kernels: Sequence[Region]) -> Lever:
    """bytes: of values that no step stores any more."""
    stored = {name for region in kernels for name in region.writes}
    made = (graph.steps[graph.position[name]] for region in kernels for name in region.steps)
    gone = {graph.storage_of(name) for step in made for name in step.writes if name not in stored}
    return Lever(KERNELS, "reordered", sum(graph.storages[name].nbytes for name in gone), 0.0, len(kernels))


def _told(kernels: Sequence[Region]) -> str:
    steps, keys = sum(len(region.steps) for region in kernels), {region.key for region in kernels}
    apart, moved = (format_size(sum(sizes)) for sizes in ([r.apart for r in kernels], [r.moved for r in kernels]))
    return (
        f"{len(keys)} generated kernels in {len(kernels)} places run {steps} operations and move {moved} instead of "
        f"{apart}; the seconds are those without them"
    )
