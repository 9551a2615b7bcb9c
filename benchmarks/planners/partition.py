"""torch's own planner, for real: its min-cut partitioner with `activation_memory_budget`, on the captured joint graph.

What it makes is kept by step names (the steps are the joint graph's nodes), so that it can be scored like any plan.
Common subexpressions are left alone (`cse` off): every planner plans on the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch._functorch.config as functorch_config
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition

from benchmarks.planners.export import Partition
from memopt.facts import is_getitem
from memopt.program import Program

SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0)


def partitions(program: Program, limit: float) -> Iterator[Partition]:
    """One partition for each of SHARES, until `limit` seconds are over. Raises what the partitioner raises."""
    until = time.perf_counter() + limit
    for share in SHARES:
        if time.perf_counter() > until:
            return
        yield partition(program, share)


def partition(program: Program, share: float) -> Partition:
    """torch's partition of the program at this share of the bytes it would save."""
    started = time.perf_counter()
    with functorch_config.patch(activation_memory_budget=share, cse=False):
        forward, backward = min_cut_rematerialization_partition(
            program.copy().module, None, num_fwd_outputs=program.forward_outputs, static_lifetime_input_indices=[]
        )
    seconds = time.perf_counter() - started
    return Partition(share, names(program, forward), names(program, backward), seconds)


def names(program: Program, module: fx.GraphModule) -> tuple[str, ...]:
    """The steps of one half, in order."""
    calls = (node for node in module.graph.nodes if node.op == "call_function" and not is_getitem(node))
    return tuple(program.prefix + node.name for node in calls)
