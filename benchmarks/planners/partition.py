"""torch's own planner, for real: its min-cut partitioner with `activation_memory_budget`, on the captured joint graph.

What it makes is kept by step names (the steps are the joint graph's nodes), so that it can be scored like any plan.
Common subexpressions are left alone (`cse` off): every planner plans on the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch._functorch.config as functorch_config
import torch._functorch.partitioners as partitioners
from torch import fx
from torch.utils._ordered_set import OrderedSet

from benchmarks.planners.export import Partition
from memopt.facts import is_getitem
from memopt.garbage import collected_later
from memopt.program import Program

SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0)


def partitions(program: Program, limit: float) -> Iterator[Partition]:
    """One partition for each of SHARES, until `limit` seconds are over. Raises what the partitioner raises."""
    until = time.perf_counter() + limit
    with cuts_once():
        for share in SHARES:
            if time.perf_counter() > until:
                return
            yield partition(program, share)


@contextmanager
def cuts_once() -> Iterator[None]:
    """For one program: torch solves three cuts and reckons operations' seconds for each share anew, to the same result.
    Those are kept by the nodes' names; what a share changes, the choice and the cut it leads to, is torch's each time.
    """
    solve, reckon = partitioners.solve_min_cut, partitioners.estimate_runtime
    cuts: dict[str, tuple[list[str], list[str]]] = {}
    seconds: dict[str, float] = {}

    def cut(graph: fx.Graph, info: Any, options: Any, dont_ban: Any = None) -> Any:
        if dont_ban:
            return solve(graph, info, options, dont_ban)
        if repr(options) not in cuts:
            saved, banned = solve(graph, info, options)
            cuts[repr(options)] = [node.name for node in saved], [node.name for node in banned]
        nodes = {node.name: node for node in graph.nodes}
        kept, barred = cuts[repr(options)]
        return [nodes[name] for name in kept], OrderedSet(nodes[name] for name in barred)

    def runtime(node: fx.Node) -> float:
        if node.name not in seconds:
            seconds[node.name] = reckon(node)
        return seconds[node.name]

    partitioners.solve_min_cut, partitioners.estimate_runtime = cut, runtime
    try:
        yield
    finally:
        partitioners.solve_min_cut, partitioners.estimate_runtime = solve, reckon


def partition(program: Program, share: float) -> Partition:
    """torch's partition of the program at this share of the bytes it would save."""
    started = time.perf_counter()
    with collected_later(), functorch_config.patch(activation_memory_budget=share, cse=False):
        forward, backward = partitioners.min_cut_rematerialization_partition(
            program.copy().module, None, num_fwd_outputs=program.forward_outputs, static_lifetime_input_indices=[]
        )
    seconds = time.perf_counter() - started
    return Partition(share, names(program, forward), names(program, backward), seconds)


def names(program: Program, module: fx.GraphModule) -> tuple[str, ...]:
    """The steps of one half, in order."""
    calls = (node for node in module.graph.nodes if node.op == "call_function" and not is_getitem(node))
    return tuple(program.prefix + node.name for node in calls)
