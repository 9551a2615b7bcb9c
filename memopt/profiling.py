"""Operations of the captured programs measured on the device that will run them: seconds and workspace by cost key."""

from __future__ import annotations

from collections.abc import Iterable

from memopt.devices import Device
from memopt.facts import facts, is_getitem
from memopt.pipeline import Costs
from memopt.program import Program
from memopt.runtime.opcost import OpCosts

SECONDS = 30.0  # time limit of measuring; operations left over are priced by the roofline


def measure_costs(programs: Iterable[Program], device: Device, present: str | None = "cpu") -> Costs:
    """Measure each distinct operation once. present: torch device that is here; None measures nothing."""
    if present is None or present.partition(":")[0] != device.kind:
        return Costs()
    meter = OpCosts(present, seconds_limit=SECONDS)
    seconds: dict[str, float] = {}
    workspaces: dict[str, int] = {}
    for program in programs:
        for node in program.graph.nodes:
            if node.op != "call_function" or is_getitem(node) or (key := facts(node).key) in seconds:
                continue
            cost = meter.measure(node)
            if cost is not None:
                seconds[key] = cost.seconds
                if cost.workspace > 0:
                    workspaces[key] = cost.workspace
    return Costs(seconds, workspaces)
