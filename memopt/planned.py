"""A planned step: what is shown of it, and how its programs are changed to run by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from memopt.applied import apply_plan
from memopt.compose import without_outputs
from memopt.edit import Remake, edit
from memopt.emission import beating_inductor, emitted
from memopt.errors import VerifyError
from memopt.fences import fenced
from memopt.fusion import Fences, Fused, expanded
from memopt.graph import StepGraph, verify
from memopt.merged import Region, merged
from memopt.optim.photograph import WHOLE
from memopt.optim.portions import Update
from memopt.photograph import photograph
from memopt.plans import Plan, Problem
from memopt.program import Program
from memopt.report import PlanResult
from memopt.streams import renumbered
from memopt.timeline import peak
from memopt.units import format_size


@dataclass(frozen=True)
class Planned:
    """result: what is shown. problem: what was solved, on the contracted graph.

    signatures, names: of the programs of the step's runs, in order (`Program.names`).
    lowered_released: as `PlanResult.lowered`, when the caller lets go of the outputs beside the loss. fences: how far
    the compiler is held to the plan's kernels. update: how the optimizer is to step. lowering: what runs it.
    left_out: rewrites of the forward that it does without, beyond those that were switched off. chunks: in how many
    what streams is to run; 0: nothing does. shards: ranks that share one copy of the optimizer's state; 0: there are no
    others. overlaps: whether there are copies that may go on while other steps run. kernels: regions that run as one;
    beside: whether such kernels stand in Inductor's code, where they move fewer bytes. numbers: of chunks, of steps
    that stream in fewer than the others.
    """

    result: PlanResult
    problem: Problem
    contracted: Fused
    signatures: tuple[str, ...]
    names: tuple[Mapping[str, str], ...]
    lowered_released: Mapping[str, int] = field(default_factory=dict)
    fences: Fences = Fences.FREE
    update: Update = WHOLE
    lowering: str = "eager"
    left_out: frozenset[str] = frozenset()
    chunks: int = 0
    shards: int = 0
    overlaps: bool = False
    kernels: tuple[Region, ...] = ()
    beside: bool = False
    numbers: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def released(self) -> PlanResult:
        """The result when the caller drops the forward's outputs beside the loss before the backward begins."""
        before, after = (without_outputs(graph) for graph in (self.result.before, self.result.after))
        plain = self.result.plain and without_outputs(self.result.plain)
        lowered = self.lowered_released
        plan = replace(self.result.plan, peak=max(lowered.values(), default=peak(after, self.result.block)))
        return replace(self.result, before=before, after=after, plain=plain, plan=plan, lowered=lowered)

    def noted(self, note: str) -> Planned:
        """The plan with one more thing to say."""
        return replace(self, result=replace(self.result, notes=(*self.result.notes, note)))

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

    def instead_of(self, refused: PlanResult) -> Planned:
        """The plan, saying that it is not what the compiler's code would have been."""
        least, budget = format_size(refused.plan.peak), format_size(refused.budget)
        note = f"runs in the eager lowering: Inductor's code takes {least} at least, of a budget of {budget}"
        return replace(self, result=replace(self.result, notes=(note, *self.result.notes)))

    def places(self, signature: str) -> tuple[int, ...]:
        """Which runs of the step are of the graph with this signature; none if it is not part of the plan."""
        return tuple(place for place, known in enumerate(self.signatures) if known == signature)

    def named(self, program: Program, place: int) -> Program:
        """The program of this run, under the names of the plan."""
        return replace(program, prefix=prefix_of(place), names=self.names[place])

    def remakes(self, place: int) -> tuple[Remake, ...]:
        """The remakes of this run."""
        return tuple(r for r in self.expanded(self.result.plan) if owner_of(r.value) == prefix_of(place))

    def decisions(self, place: int) -> tuple[tuple[str, ...], ...]:
        """What this run makes again and where: its steps and their reads. Equal for runs that may share their code."""
        prefix = prefix_of(place)
        mine = [step for step in edit(self.whole, self.remakes(place)).steps if owner_of(step.name) == prefix]
        own = (tuple(n.removeprefix(prefix) for n in (s.name, *s.reads) if owner_of(n) == prefix) for s in mine)
        kernels = ((region.step.removeprefix(prefix), region.key) for region in self.regions(prefix))
        numbers = ((n.removeprefix(prefix), str(k)) for n, k in self.numbers.items() if owner_of(n) == prefix)
        return (*own, *kernels, *numbers)

    def regions(self, prefix: str) -> tuple[Region, ...]:
        """The regions of the runs whose steps' names begin so that run as one kernel."""
        return tuple(region for region in self.kernels if owner_of(region.step) == prefix)

    @property
    def running(self) -> StepGraph:
        """The step as it runs: after the plan's decisions, with its kernels."""
        return merged(self.result.after, self.kernels) if self.kernels else self.result.after

    @property
    def whole(self) -> StepGraph:
        """The graph of the real steps, which `expanded` remakes refer to."""
        return self.contracted.original

    def expanded(self, plan: Plan) -> tuple[Remake, ...]:
        """The plan's remakes as they are inserted: of the real steps, not the fused ones."""
        return expanded(self.contracted, plan.chosen)

    def applied(self, program: Program, remakes: Sequence[Remake], fences: Fences) -> Program:
        """One of the step's programs with its remakes inserted, verified; kernels' borders marked, or ours put in."""
        changed = fenced(apply_plan(program, self.whole, remakes), self.contracted, remakes, fences)
        changed = renumbered(changed, self.numbers) if self.numbers else changed
        mine = beating_inductor(changed) if self.beside else self.regions(program.prefix)
        return in_kernels(changed, mine) if mine else changed


def in_kernels(program: Program, regions: Sequence[Region]) -> Program:
    """The program with these regions as kernels: its photograph must be what `merged` predicted."""
    made = emitted(program, regions)
    if verify(photograph(made)).steps_alike(merged(photograph(program), regions)):
        return made
    raise VerifyError("a region's kernel does not stand where the plan has it; this is a bug in memopt.emission")


def prefix_of(index: int) -> str:
    """What the names of a run's steps begin with."""
    return f"g{index}/" if index else ""


def owner_of(name: str) -> str:
    """The prefix of a step's or a value's name."""
    head, slash, _ = name.partition("/")
    return head + slash if slash and head[0] == "g" and head[1:].isdigit() else ""
