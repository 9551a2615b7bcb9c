"""Largest first: the greedy of torchtitan's budget-aware policy, as its pull request describes it.

pytorch/torchtitan#4636 (with #3943, #3975; read as public threads in 2026-09): per tensor keep or make again; an outer
step gives each transformer layer a share, an inner one tags single tensors; layers' inputs are kept, draws and views
are never tagged, equal layers are treated alike; what is dropped is made again once, before its first late reader. Its
greedy takes the largest tensors of a layer first. Here: layers in turns, until the simulated peak holds the budget; no
offload, which no planner of this tier has.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.planners.answer import Answer
from benchmarks.planners.export import Work
from benchmarks.planners.schedule import Schedule, explicit, pruned
from benchmarks.planners.simulator import simulate
from benchmarks.planners.stages import Chain, chain_of
from memopt.graph import Step, StepGraph

HALVINGS = 12  # of the number of tensors dropped


def titan_greedy(work: Work, budget: int) -> Answer:
    """As few as hold the budget, of the largest of every layer, then the second largest of every layer, ...; all of
    them if none does. Found by halving, as its peak falls with every tensor but for the moments of making it again."""
    order = tuple(by_turns(chain_of(work)))
    schedule = remade(work.graph, frozenset(order))
    few, many = 0, len(order)
    if simulate(work.graph, work.seconds, schedule, work.block).peak > budget:
        return Answer(schedule, note=f"all {many} tensors are not enough")
    for _ in range(HALVINGS):
        middle = (few + many) // 2
        tried = remade(work.graph, frozenset(order[:middle]))
        if simulate(work.graph, work.seconds, tried, work.block).peak <= budget:
            many, schedule = middle, tried
        else:
            few = middle + 1
        if few >= many:
            break
    return Answer(schedule, note=f"{many} of {len(order)} tensors")


def by_turns(chain: Chain) -> Iterator[str]:
    """Every layer's largest, then every layer's second largest, ...; earlier layers first."""
    layers = [list(names) for names in candidates(chain)]
    for turn in range(max(map(len, layers), default=0)):
        yield from (names[turn] for names in layers if turn < len(names))


def candidates(chain: Chain) -> Iterator[list[str]]:
    """Of each layer: what its backward reads and may be made again, largest first; not what the next layer reads."""
    makers = {name: step for step in chain.work.graph.steps for name in chain.work.graph.created(step)}
    for at in range(len(chain.stages)):
        inside = chain.saved(at) - chain.crossing(at)
        able = [name for name in inside if makers[name].pure and not makers[name].advances]
        yield sorted(able, key=lambda name: (-chain.size(name), name))


def remade(graph: StepGraph, dropped: frozenset[str]) -> Schedule:
    """The step with these storages made again once each, just before the first late step that needs them."""
    names, made = [step.name for step in graph.steps[: graph.boundary]], set[str]()
    for step in graph.steps[graph.boundary :]:
        again = missing(graph, step, dropped, made)
        names += [graph.steps[at].name for at in again]
        made.update(name for at in again for name in graph.steps[at].writes)
        names.append(step.name)
    return pruned(graph, explicit(graph, names))


def missing(graph: StepGraph, reader: Step, dropped: frozenset[str], made: set[str]) -> list[int]:
    """Positions of forward steps to run again before `reader`, ascending."""
    found, stack = set[int](), list(reader.reads)
    while stack:
        name = stack.pop()
        at = graph.producer.get(name, graph.boundary)
        if graph.storage_of(name) in dropped and name not in made and at < graph.boundary and at not in found:
            found.add(at)
            stack.extend(graph.steps[at].reads)
    return sorted(found)
