"""The neutral plan format: which step runs when, and which earlier run made each tensor it reads.

Every planner ends in one of these, whatever it calls its plan. `check` refuses what is not the same computation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memopt.graph import Step, StepGraph
from memopt.plans import original

GIVEN = -1  # the "run" that made the step's inputs


class ScheduleError(ValueError):
    """A schedule that does not compute what the graph computes; says which rule and which run."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a step. reads: for each tensor the step reads, in its order, the index of the run that made it."""

    step: str
    reads: tuple[int, ...]


Schedule = tuple[Run, ...]


def steps_of(graph: StepGraph) -> dict[str, Step]:
    """Step name -> step."""
    return {step.name: step for step in graph.steps}


def explicit(graph: StepGraph, names: Iterable[str]) -> Schedule:
    """Runs for a plain sequence of step names: each read goes to the latest run of its tensor's producer.

    Raises ScheduleError if a step reads what no earlier run made.
    """
    steps, where, runs = steps_of(graph), dict.fromkeys(graph.inputs, GIVEN), list[Run]()
    for name in names:
        missing = next((read for read in steps[name].reads if read not in where), None)
        if missing is not None:
            raise ScheduleError(f"run {len(runs)} of {name} reads {missing} before any run makes it")
        runs.append(Run(name, tuple(where[read] for read in steps[name].reads)))
        where.update(dict.fromkeys(steps[name].writes, len(runs) - 1))
    return tuple(runs)


def final_runs(graph: StepGraph, schedule: Schedule) -> dict[str, int]:
    """Output tensor -> the run the caller gets it from: the first of its producer. GIVEN for inputs handed through."""
    first: dict[str, int] = {}
    for at, run in enumerate(schedule):
        first.setdefault(run.step, at)
    made = {name: graph.steps[graph.producer[name]].name for name in graph.outputs if name in graph.producer}
    return {name: first.get(made[name], len(schedule)) if name in made else GIVEN for name in graph.outputs}


def pruned(graph: StepGraph, schedule: Schedule) -> Schedule:
    """The schedule without runs whose results nobody reads. Anchors stay; of a step that draws, the first run."""
    steps, seen = steps_of(graph), set[str]()
    needed = set(final_runs(graph, schedule).values())
    for at, run in enumerate(schedule):
        if is_anchor(graph, steps[run.step]) and run.step not in seen:
            needed.add(at)
        seen.add(run.step)
    for at in reversed(range(len(schedule))):
        if at in needed:
            needed.update(schedule[at].reads)
    kept = [at for at in range(len(schedule)) if at in needed]
    moved = {GIVEN: GIVEN, **{at: new for new, at in enumerate(kept)}}
    return tuple(Run(schedule[at].step, tuple(moved[r] for r in schedule[at].reads)) for at in kept)


def is_anchor(graph: StepGraph, step: Step) -> bool:
    """Whether the step must run and keeps its place among its like: backward and optimizer work (views cost nothing
    and may be taken again), what changes something, what draws."""
    return not step.pure or step.advances or (step.phase != "forward" and not graph.is_view(step))


def check(graph: StepGraph, schedule: Schedule) -> Schedule:
    """The schedule, if it computes what the graph computes; else ScheduleError names the rule and the run.

    Rules: every anchor runs, in the order of the graph; of the steps, only pure ones run twice, and of those of the
    backward and optimizer only views; each read is of an earlier run that made that very tensor; nothing is made again
    from what has been overwritten meanwhile; each output is made by some run.
    """
    steps, counts, overwritten = steps_of(graph), dict[str, int](), set[str]()
    for at, run in enumerate(schedule):
        if run.step not in steps:
            raise ScheduleError(f"run {at} is of {run.step!r}, which the graph does not have")
        step = steps[run.step]
        _check_reads(graph, schedule, at, step)
        _check_repeat(graph, at, step, counts.get(step.name, 0), overwritten)
        counts[step.name] = counts.get(step.name, 0) + 1
        if not step.pure:
            read = {graph.storage_of(name) for name in step.reads}
            overwritten |= read & {graph.storage_of(name) for name in step.writes}
    _check_order(graph, schedule)
    lost = [name for name, at in final_runs(graph, schedule).items() if at == len(schedule)]
    if lost:
        raise ScheduleError(f"no run makes the output {lost[0]}")
    return schedule


def _check_reads(graph: StepGraph, schedule: Schedule, at: int, step: Step) -> None:
    run = schedule[at]
    if len(run.reads) != len(step.reads):
        raise ScheduleError(f"run {at} of {step.name} names {len(run.reads)} reads; the step has {len(step.reads)}")
    for name, maker in zip(step.reads, run.reads, strict=True):
        if maker >= at or maker < GIVEN:
            raise ScheduleError(f"run {at} of {step.name} reads {name} of run {maker}, which is not an earlier one")
        wanted = graph.steps[graph.producer[name]].name if name in graph.producer else None
        if wanted != (None if maker == GIVEN else schedule[maker].step):
            raise ScheduleError(f"run {at} of {step.name} reads {name}, which run {maker} does not make")


def _check_repeat(graph: StepGraph, at: int, step: Step, before: int, overwritten: set[str]) -> None:
    late = step.phase != "forward" and not graph.is_view(step)
    if before and (not step.pure or late):
        raise ScheduleError(f"run {at} is another of {step.name}, which runs once")
    stale = overwritten & {graph.storage_of(name) for name in step.reads}
    if stale and (before or not is_anchor(graph, step)):
        raise ScheduleError(f"run {at} of {step.name} reads {min(stale)} after it was overwritten")


def _check_order(graph: StepGraph, schedule: Schedule) -> None:
    first = dict.fromkeys(run.step for run in schedule)
    anchors = [step.name for step in graph.steps if is_anchor(graph, step)]
    known = set(anchors)
    for want, found in zip(anchors, [*(name for name in first if name in known), *[None] * len(anchors)], strict=False):
        if want != found:
            raise ScheduleError(f"{want} should run next of the steps that keep their order, not {found}")


def from_edited(graph: StepGraph, edited: StepGraph) -> Schedule:
    """The schedule of a graph that `memopt.edit.edit` made of `graph`: copies are runs of their originals."""
    where = dict.fromkeys(edited.inputs, GIVEN)
    runs: list[Run] = []
    for step in edited.steps:
        name = step.name if step.name in graph.position else original(step.name)
        runs.append(Run(name, tuple(where[read] for read in step.reads)))
        where.update(dict.fromkeys(step.writes, len(runs) - 1))
    return tuple(runs)
