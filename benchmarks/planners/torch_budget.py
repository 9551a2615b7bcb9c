"""torch's `activation_memory_budget`: the partitions of partition.py, the best that holds the budget.

The knob is a share of the saved bytes, not a peak, and need not be monotone: the whole sweep is looked at, which is
what a user would have to do. That takes the seconds of the sweep, which are stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.planners.answer import Answer
from benchmarks.planners.export import Partition, Work
from benchmarks.planners.schedule import Schedule, explicit, is_anchor, pruned, steps_of
from benchmarks.planners.simulator import Score, simulate
from memopt.graph import StepGraph


def torch_budget(work: Work, budget: int) -> Answer:
    """The fastest share whose simulated peak holds; the lowest peak if none does."""
    if not work.partitions:
        return Answer(None, note="; ".join(work.notes) or "no partition was exported")
    found = [(part, *scored(work, part)) for part in work.partitions]

    def rank(item: tuple[Partition, Schedule, Score]) -> tuple[float, float, int]:
        return max(item[2].peak - budget, 0), item[2].seconds, item[2].peak

    part, schedule, _ = min(found, key=rank)
    took = sum(p.seconds for p in work.partitions)
    return Answer(schedule, note=f"share {part.share}; {len(found)} shares took {took:.0f} s")


def scored(work: Work, part: Partition) -> tuple[Schedule, Score]:
    """The partition as a schedule, and its score."""
    schedule = schedule_of(work.graph, part)
    return schedule, simulate(work.graph, work.seconds, schedule, work.block)


def schedule_of(graph: StepGraph, part: Partition) -> Schedule:
    """Forward half, backward half, and where they stand in the graph the steps no half has: reading a generator's
    state before a draw, the caller's own (writing back statistics, the gradient of the loss), the optimizer."""
    halves = {*part.forward, *part.backward}
    rest = [step for step in graph.steps if step.name not in halves and is_anchor(graph, step)]
    sources = {step.writes[0]: step.name for step in rest if step.writes and not step.reads}
    forward = with_sources(graph, part.forward, sources)
    early = [s.name for s in rest if s.phase == "forward" and s.reads]
    begin = [s.name for s in rest if s.phase == "backward" and not s.reads]
    end = [s.name for s in rest if s.phase == "optimizer" or (s.phase == "backward" and s.reads)]
    return pruned(graph, explicit(graph, (*forward, *early, *begin, *part.backward, *end)))


def with_sources(graph: StepGraph, names: Sequence[str], sources: Mapping[str, str]) -> list[str]:
    """The names with each source of a tensor (tensor -> step) put before the first step that reads it."""
    out, steps, left = list[str](), steps_of(graph), dict(sources)
    for name in names:
        out += [left.pop(read) for read in steps[name].reads if read in left]
        out.append(name)
    return out
