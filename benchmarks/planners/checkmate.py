"""Checkmate: rematerialisation as a mixed-integer program over a block graph of at most 60 nodes.

Jain et al., arXiv:1910.02653: R[t, i] runs node i in stage t, S[t, i] keeps it for stage t, U is the memory after each
run, FREE what is let go after it. Rows of the forward are left out, as they are fixed: in a chain no forward needs
again what it let go. Nodes behind a stage's own are useless there and left out too. PuLP builds it, HiGHS solves it;
its relaxation is the bound, which holds for plans of this block graph, not for finer ones. Where time runs out before
a solution is found, the relaxation is rounded as in the paper: S at a threshold, then the runs that asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pulp

from benchmarks.planners.answer import Answer, settled
from benchmarks.planners.blockgraph import BlockGraph, block_graph, names
from benchmarks.planners.export import Work
from benchmarks.planners.schedule import Schedule
from benchmarks.planners.stages import chain_of, joined, schedule_of

NODES = 60  # of the block graph, three a stage
LIMIT = 4.0  # seconds of all searches in integers for one budget; the later ones get LEAST each
LEAST, ASKS = 0.5, 4
GAP = 0.005
TIE = 1e-7  # of the forward: no run for nothing
THRESHOLDS = (0.9, 0.7, 0.5, 0.3, 0.1)
Choice = frozenset[tuple[int, int]]  # (stage of the backward, node run again before it)


@dataclass
class Model:
    """The program of one block graph and budget. runs, keeps: [stage, node] -> variable. Bytes: shares of the room."""

    graph: BlockGraph
    room: float
    problem: pulp.LpProblem
    runs: dict[tuple[int, int], pulp.LpVariable]
    keeps: dict[tuple[int, int], pulp.LpVariable]


def checkmate(work: Work, budget: int) -> Answer:
    """The program's answer as a schedule, and the relaxation's bound (seconds added, on the block graph)."""
    graph, first = block_graph(joined(chain_of(work), NODES // 3)), list[float]()
    until = perf_counter() + LIMIT

    def ask(target: float) -> Schedule | None:
        choice, bound = planned(graph, target, max(LEAST, until - perf_counter()))
        first.append(bound)
        return None if choice is None else schedule_of(graph.chain, tuple(names(graph, choice)))

    schedule = settled(work, budget, ask, ASKS)
    return Answer(schedule, first[0], note=f"{len(graph.nodes) + len(graph.late)} nodes")


def planned(graph: BlockGraph, budget: float, limit: float = LIMIT) -> tuple[Choice | None, float]:
    """(what runs again, or None; lower bound on its seconds, inf if the relaxation has no solution)."""
    model = build(graph, budget)
    if model is None or not solved(model, pulp.HiGHS(mip=False, msg=False, threads=1)):
        return None, float("inf")
    bound = max(0.0, float(pulp.value(model.problem.objective) or 0.0)) * scale(graph)
    rounded = best(model, (closed(model, threshold) for threshold in THRESHOLDS))
    if solved(model, pulp.HiGHS(msg=False, threads=1, timeLimit=limit, gapRel=GAP)):
        found = frozenset(key for key, var in model.runs.items() if (var.varValue or 0) > 0.5)
        rounded = best(model, (found, *([rounded] if rounded is not None else [])))
    return rounded, bound


def solved(model: Model, solver: pulp.LpSolver) -> bool:
    """Whether the solver left values that keep all rows."""
    model.problem.solve(solver)
    return model.problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)


def scale(graph: BlockGraph) -> float:
    """Seconds of one unit of the objective."""
    return sum(node.seconds for node in graph.nodes) or 1.0


def build(graph: BlockGraph, budget: float) -> Model | None:
    """The program; None if not even the forward fits."""
    room = budget - graph.base
    if room <= 0:
        return None
    pairs = [(k, i) for k in range(len(graph.late)) for i, node in enumerate(graph.nodes) if node.stage <= k]
    problem = pulp.LpProblem("checkmate", pulp.LpMinimize)
    runs = {(k, i): problem.add_variable(f"R_{k}_{i}", 0, 1, "Binary") for k, i in pairs}
    keeps = {(k, i): problem.add_variable(f"S_{k}_{i}", 0, 1, "Binary") for k, i in pairs}
    problem += cost(graph, problem, runs)
    model = Model(graph, room, problem, runs, keeps)
    forward_rows(model)
    for k in range(len(graph.late)):
        stage_rows(model, k)
        memory_rows(model, k)
    return model


def cost(graph: BlockGraph, problem: pulp.LpProblem, runs: dict[tuple[int, int], pulp.LpVariable]) -> Any:
    """Seconds of all runs, less what a stage's second node is spared beside its first; in shares of the forward."""
    terms = [(graph.nodes[i].seconds / scale(graph) + TIE) * var for (_, i), var in runs.items()]
    for k, i in [key for key in runs if graph.nodes[key[1]].spared]:
        both = problem.add_variable(f"BOTH_{k}_{i}", 0, 1)
        problem += both <= runs[k, i]
        problem += both <= runs[k, i - 1]
        terms.append(-graph.nodes[i].spared / scale(graph) * both)
    return pulp.lpSum(terms)


def forward_rows(model: Model) -> None:
    """While node i first runs: what is kept of earlier nodes, what it reads, itself, its scratch."""
    last, nodes = len(model.graph.late) - 1, model.graph.nodes
    for i, node in enumerate(nodes):
        held = node.nbytes + node.scratch + sum(nodes[j].nbytes for j in node.needs)
        kept = pulp.lpSum(
            nodes[j].nbytes / model.room * model.keeps[last, j] for j in range(i) if j not in node.needs
        )  # fmt: skip
        model.problem += kept + held / model.room <= 1


def stage_rows(model: Model, k: int) -> None:
    """What is read is there; what is kept was there before; nothing is there twice."""
    runs, keeps, late = model.runs, model.keeps, model.graph.late
    for i, node in enumerate(model.graph.nodes):
        if (k, i) not in runs:
            continue
        model.problem += runs[k, i] + keeps[k, i] <= 1
        for j in node.needs:
            model.problem += runs[k, i] <= runs[k, j] + keeps[k, j]
        if (k + 1, i) in keeps:
            model.problem += keeps[k, i] <= keeps[k + 1, i] + runs[k + 1, i]
    for j in late[k].needs:
        if (k, j) in runs:
            model.problem += runs[k, j] + keeps[k, j] >= 1


def memory_rows(model: Model, k: int) -> None:
    """U after each run of stage k, and the backward at its end."""
    nodes, late, runs, room = model.graph.nodes, model.graph.late[k], model.runs, model.room
    mine = [i for i in range(len(nodes)) if (k, i) in runs]
    used = pulp.lpSum(nodes[i].nbytes / room * model.keeps[k, i] for i in mine)
    for place, i in enumerate(mine):
        now = model.problem.add_variable(f"U_{k}_{i}", 0)
        model.problem += now == used + nodes[i].nbytes / room * runs[k, i]
        model.problem += now + (nodes[i].scratch + late.start) / room * runs[k, i] <= 1
        freed = (free(model, k, i, j, mine[place + 1 :]) for j in (*nodes[i].needs, i) if (k, j) in runs)
        used = now - pulp.lpSum(freed)
    model.problem += used + late.most / room <= 1


def free(model: Model, k: int, i: int, j: int, after: list[int]) -> pulp.LpAffineExpression:
    """Bytes of node j let go after node i ran in stage k: nobody in the stage or behind it needs it any more."""
    nodes, var = model.graph.nodes, model.problem.add_variable(f"FREE_{k}_{j}_{i}", 0, 1, "Binary")
    hazards = [1 - model.runs[k, i]]
    hazards += [model.keeps[k - 1, j]] if (k - 1, j) in model.keeps else []
    hazards += [model.runs[k, user] for user in after if j in nodes[user].needs]
    hazards += [pulp.LpAffineExpression(constant=1)] if j in model.graph.late[k].needs else []
    for hazard in hazards:
        model.problem += var <= 1 - hazard
    # Nothing forces FREE up: letting go is never worse, so a solution that leaves it at 0 only holds more than it must.
    return nodes[j].nbytes / model.room * var


def closed(model: Model, threshold: float) -> Choice:
    """The relaxation's S above the threshold is kept, and what that leaves out is run again where it is read."""
    kept = {key for key, var in model.keeps.items() if (var.varValue or 0.0) >= threshold}
    graph, runs, here = model.graph, set[tuple[int, int]](), set(range(len(model.graph.nodes)))
    for k in reversed(range(len(graph.late))):
        here = {i for i in here if (k, i) in kept}
        wanted = [i for i in graph.late[k].needs if i not in here]
        while wanted:
            i = wanted.pop()
            if i not in here:
                here.add(i)
                runs.add((k, i))
                wanted += [j for j in graph.nodes[i].needs if j not in here]
    return frozenset(runs)


def best(model: Model, choices: Iterable[Choice]) -> Choice | None:
    """The cheapest of those that hold the budget by the block graph's own account; None if none does."""
    holding = [c for c in choices if peak(model.graph, c) <= model.room]
    return min(holding, key=lambda c: seconds(model.graph, c), default=None)


def seconds(graph: BlockGraph, choice: Choice) -> float:
    """Seconds the runs add."""
    spared = sum(graph.nodes[i].spared for k, i in choice if (k, i - 1) in choice)
    return sum(graph.nodes[i].seconds for _, i in choice) - spared


def peak(graph: BlockGraph, choice: Choice) -> int:
    """Most bytes over the graph's base, by playing the choice: a value lives from its run to its last reader."""
    count = len(graph.nodes)
    events = [(-1, i) for i in range(count)]
    for k in reversed(range(len(graph.late))):
        events += [(k, i) for i in range(count) if (k, i) in choice] + [(k, count)]
    alive: dict[int, int] = {}
    most, ends = 0, last_reads(graph, events)
    for at, (k, i) in enumerate(events):
        held = sum(graph.nodes[j].nbytes for j in alive)
        if i == count:
            most = max(most, held + graph.late[k].most)
        else:
            start = graph.late[k].start if k >= 0 else 0
            fresh = 0 if i in alive else graph.nodes[i].nbytes
            most = max(most, held + fresh + graph.nodes[i].scratch + start)
            alive[i] = at
        alive = {j: born for j, born in alive.items() if ends.get((j, born), born) > at}
    return most


def last_reads(graph: BlockGraph, events: list[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """(node, event that made it) -> last event that reads it."""
    made: dict[int, int] = {}
    ends: dict[tuple[int, int], int] = {}
    for at, (k, i) in enumerate(events):
        needs: Iterator[int] = iter(graph.late[k].needs if i == len(graph.nodes) else graph.nodes[i].needs)
        ends.update({(j, made[j]): at for j in needs if j in made})
        if i < len(graph.nodes):
            made[i] = at
    return ends
