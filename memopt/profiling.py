"""Operations of the captured programs priced on the device that will run them: seconds and workspace by cost key."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from memopt.devices import Device
from memopt.pipeline import Costs
from memopt.program import Program
from memopt.runtime.opcost import OpCosts

SECONDS = 30.0  # time limit of measuring; operations left over are priced by the roofline


def measured_costs(programs: Iterable[Program], device: Device, measure: bool) -> Costs:
    """What is known of the programs' operations on this device, if it is here.

    measure: run those not yet known, each once, on tensors of their own; otherwise only what earlier runs stored.
    """
    if device.kind == "cuda" and not torch.cuda.is_available():
        return Costs()
    with OpCosts(device.kind, seconds_limit=SECONDS if measure else 0.0) as meter:
        found = meter.measure_all(calls(programs))
    workspaces = {key: cost.workspace for key, cost in found.items() if cost.workspace > 0}
    return Costs({key: cost.seconds for key, cost in found.items()}, workspaces)


def calls(programs: Iterable[Program]) -> list[fx.Node]:
    return [node for program in programs for node in program.graph.nodes if node.op == "call_function"]
