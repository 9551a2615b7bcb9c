"""torch's own `sac_milp` (torch.distributed._tools.sac_ilp), for real, on statistics of the step graph's stages.

Its module tree is flat here: a root, and one module a stage. Bytes, milliseconds and the trade-off curve of each
module are what torch's MemTracker and SACEstimator would have measured, taken from the graph instead (they need a
device). The budget it gets is the asked one less what it does not model: buffers, inputs and optimizer state. Its
answer, a share to discard per module, goes through torch's second program, which picks operations; a module so
treated runs again at once when the backward reaches it, as torch's checkpoint does.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import psutil
import pulp
import torch.distributed._tools.sac_ilp as sac_ilp
from torch.distributed._tools.ilp_utils import ModStats, parse_module_info
from torch.distributed._tools.sac_estimator import SACStats

from benchmarks.planners.answer import Answer, settled
from benchmarks.planners.export import Work
from benchmarks.planners.schedule import Schedule
from benchmarks.planners.stages import Chain, Sizes, chain_of, schedule_of, sequence
from memopt.graph import Step

ROOT = "model"
ASKS = 3  # each takes a second or more
Curve = list[tuple[float, float]]  # (share of bytes discarded, share of seconds run again), ascending


def sac_milp(work: Work, budget: int) -> Answer:
    """torch's choice of modules and operations; None if its program finds none."""
    chain = chain_of(work)
    solver = _with_solver()
    try:
        schedule = settled(work, budget, lambda target: planned(chain, target), ASKS)
    finally:
        _end_solvers()
    return Answer(schedule, note=f"solved by {solver}")


def _with_solver() -> str:
    """PuLP 4 has no CBC: HiGHS then stands in for it, under the name torch imports. The solver's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PuLP's, about the class torch uses
        if hasattr(pulp, "PULP_CBC_CMD") and pulp.PULP_CBC_CMD().available():
            return "CBC"
    setattr(sac_ilp, "PULP_CBC_CMD", pulp.HiGHS)  # noqa: B010
    return "HiGHS"


def _end_solvers() -> None:
    """CBC is a process, and goes on for the 180 s torch gives it when this one is stopped before."""
    for child in psutil.Process().children():
        if child.name() == "cbc":
            child.kill()


def planned(chain: Chain, budget: float) -> Schedule | None:
    """One run of both programs."""
    logging.getLogger(sac_ilp.__name__).setLevel(logging.CRITICAL)  # it logs an error when nothing fits
    graph = parse_module_info(module_info(chain))
    fqns = [name(at) for at in range(len(chain.stages))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found, _, peak = sac_ilp.sac_milp(graph, max(budget - unmodelled(chain), 1) / 2**30, ac_units=fqns)
        if peak < 0:
            return None
        chosen = {at: discard for at in range(len(chain.stages)) if (discard := found.get(name(at))) is not None}
        again = {at: discarded(chain, at, discard) for at, discard in chosen.items()}
    return built(chain, again)


def name(at: int) -> str:
    """The module's name in torch's tree."""
    return f"{ROOT}.stage{at}"


def unmodelled(chain: Chain) -> int:
    """Bytes of the inputs that are no parameters."""
    storages = chain.work.graph.storages
    return chain.bytes_of(n for n in chain.work.graph.input_storages if storages[n].kind != "parameter")


def parameters(chain: Chain, steps: Sequence[Step]) -> int:
    """Bytes of the parameters these steps read."""
    graph = chain.work.graph
    read = {graph.storage_of(name) for step in steps for name in step.reads}
    return chain.bytes_of(n for n in read if n in graph.input_storages and graph.storages[n].kind == "parameter")


def module_info(chain: Chain) -> Any:
    """What torch's `aggregate_stats` would return."""
    count, sizes = len(chain.stages), chain.sizes
    fqns = [name(at) for at in range(count)]
    order = {
        "fw_pre_order": [ROOT, *fqns],
        "fw_post_order": [*fqns, ROOT],
        "bw_pre_order": [ROOT, *reversed(fqns)],
        "bw_post_order": [*reversed(fqns), ROOT],
    }
    stats = [stage_stats(chain, at, sizes[at]) for at in range(count)]
    return {"mod_order": order, "mod_stats": [root_stats(chain, stats), *stats]}


def stage_stats(chain: Chain, at: int, size: Sizes) -> ModStats:
    """One module. act_total and grad_total are those when its backward begins; act_grad what that takes besides."""
    saved, given = chain.bytes_of(chain.saved(at)), chain.bytes_of(chain.crossing(at))
    total = chain.bytes_of(chain.fixed) + sum(chain.bytes_of(chain.saved(i)) for i in range(at + 1))
    ops = operations(chain, at)
    memory, seconds = sum(bytes_made(chain, at, s) for s in ops), chain.seconds(ops)
    curve = trade_off(chain, at)
    slopes, intercepts, breaks = fitted(curve)
    mine = parameters(chain, chain.forward(at))
    return ModStats(
        fqn=name(at), param_per_module=mine, grad_per_module=mine, grad_total=size.start,
        act_fw_per_module=max(0, saved - given), act_bw_per_module=total,
        act_grad_per_module=max(0, size.late - size.start), act_total=total,
        input_per_module=chain.bytes_of(chain.crossing(at - 1)) if at else 0, output_per_module=given,
        fw_runtime_per_module=1e3 * chain.seconds(chain.forward(at)),
        bw_runtime_per_module=1e3 * chain.seconds(chain.backward(at)), is_leaf=not ops or not memory,
        sac_runtime=1e3 * seconds, sac_memory=max(memory, saved - given), n_segments=len(slopes), slopes=slopes,
        intercepts=intercepts, breakpoints=breaks, tradeoff_curve=OrderedDict(curve),
    )  # fmt: skip


def root_stats(chain: Chain, stats: list[ModStats]) -> ModStats:
    """The whole model: what all modules take, never chosen itself."""
    top = stats[-1]
    every = parameters(chain, chain.work.graph.steps[: chain.work.graph.boundary])
    none: dict[str, Any] = {"sac_runtime": 0.0, "sac_memory": 0, "n_segments": 0, "slopes": [], "intercepts": []}
    none |= {"breakpoints": [], "tradeoff_curve": OrderedDict(), "act_grad_per_module": 0, "is_leaf": True}
    own = {"fqn": ROOT, "param_per_module": every, "grad_per_module": every, "act_fw_per_module": top["act_total"]}
    merged: Any = {**top, **none, **own}
    return cast(ModStats, merged)


def operations(chain: Chain, at: int) -> list[Step]:
    """The stage's steps that torch's selective checkpointing decides about."""
    return [step for step in chain.forward(at) if step.pure]


def bytes_made(chain: Chain, at: int, step: Step) -> int:
    """Bytes the step makes that the stage does not hand on."""
    return chain.bytes_of(n for n in chain.work.graph.created(step) if n not in chain.crossing(at))


def trade_off(chain: Chain, at: int) -> Curve:
    """torch's greedy order: operations that free most bytes a second are run again first."""
    ops = operations(chain, at)
    cost = {step.name: (bytes_made(chain, at, step), chain.work.seconds.get(step.name, 0.0)) for step in ops}
    order = sorted(ops, key=lambda s: -cost[s.name][0] / max(cost[s.name][1], 1e-12))
    memory, seconds = (sum(pair[i] for pair in cost.values()) or 1 for i in (0, 1))
    curve: Curve = [(0.0, 0.0)]
    for step in order:
        curve.append((curve[-1][0] + cost[step.name][0] / memory, curve[-1][1] + cost[step.name][1] / seconds))
    return curve


def fitted(curve: Curve) -> tuple[list[float], list[float], list[float]]:
    """Slopes, intercepts and ends of two straight pieces through the curve, broken where they miss it least."""
    x0, y0 = curve[0]
    x1, y1 = curve[-1]

    def missed(knot: tuple[float, float]) -> float:
        pieces = (line((x0, y0), knot), line(knot, (x1, y1)))
        return sum((y - max(a * x + b for a, b in pieces)) ** 2 for x, y in curve)

    inner = [point for point in curve if x0 < point[0] < x1] or [((x0 + x1) / 2, (y0 + y1) / 2)]
    knot = min(inner[:: max(1, len(inner) // 32)], key=missed)
    pieces = (line((x0, y0), knot), line(knot, (x1, y1)))
    return [a for a, _ in pieces], [b for _, b in pieces], [x0, knot[0], x1]


def line(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """Slope and intercept through two points; flat through the first where they stand over each other."""
    slope = (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else 0.0
    return slope, a[1] - slope * a[0]


def discarded(chain: Chain, at: int, discard: float) -> frozenset[str]:
    """Steps of the stage that torch's second program runs again when it may store 1 - discard of their bytes."""
    ops = operations(chain, at)
    position = {step.name: i for i, step in enumerate(ops)}
    views = [i for i, step in enumerate(ops) if not chain.work.graph.created(step)]
    drawn = [i for i, step in enumerate(ops) if step.advances]
    stats = SACStats(
        [step.op for step in ops], [1e3 * chain.work.seconds.get(step.name, 0.0) for step in ops],
        [bytes_made(chain, at, step) for step in ops], views, drawn, list(position.values()), [], False,
    )  # fmt: skip
    stored = sac_ilp.get_optimal_checkpointing_policy_per_module(stats, min(1.0, max(0.0, 1 - discard)))
    return frozenset(step.name for step, keep in zip(ops, stored, strict=bool(stored)) if not keep)


def built(chain: Chain, again: dict[int, frozenset[str]]) -> Schedule:
    """The chosen modules' discarded steps run again when the backward reaches them."""
    twice = frozenset().union(*again.values())
    whole = sequence(chain, {at: (at,) for at in again})
    boundary = chain.work.graph.boundary
    forward = {step.name for step in chain.work.graph.steps[:boundary]}
    late = [step for step in whole[boundary:] if step not in forward or step in twice]
    return schedule_of(chain, (*whole[:boundary], *late))
