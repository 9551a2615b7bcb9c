"""What steps cost that trades bring along and no captured program has: to pack values and to unpack them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from memopt.cost import CostModel, codec_of
from memopt.edit import Remake
from memopt.graph import Step, StepGraph, TensorInfo
from memopt.overlap import moves, waits_of
from memopt.runtime.opcost import OpCost
from memopt.tokens import WHOLE, part_of

Meter = Callable[[Step, TensorInfo], OpCost | None]  # a step and the value that is packed -> what it was measured at


def unmeasured(step: Step, value: TensorInfo) -> OpCost | None:
    """The meter where nothing is measured."""
    return None


def priced(
    graph: StepGraph, remakes: Sequence[Remake], model: CostModel, meter: Meter
) -> tuple[tuple[Remake, ...], dict[str, float]]:
    """The remakes with what they bring priced, and seconds by step name of what they bring."""
    brought = [remake for remake in remakes if remake.made]
    tensors = {**graph.tensors, **{info.name: info for remake in brought for info, _ in remake.made}}
    storages = {**graph.storages, **{storage.name: storage for remake in brought for _, storage in remake.made}}
    both = replace(graph, tensors=tensors, storages=storages)
    costs: dict[str, OpCost] = {}
    for remake in brought:
        for step in (*remake.pack, *remake.unpack):
            if step.name not in costs:
                found = meter(step, graph.tensors[remake.value])
                costs[step.name] = found or OpCost(model.seconds(both, step), 0, 0)
    filled = tuple(_filled(remake, costs) if remake.made else remake for remake in remakes)
    seconds = {name: cost.seconds for name, cost in costs.items()}
    return filled, seconds | _staying(brought, seconds)


def _staying(brought: Sequence[Remake], seconds: Mapping[str, float]) -> dict[str, float]:
    """Name of a wait (memopt/overlap.py) -> seconds of copying what stays of a part: what the part takes beyond its
    share of the whole, which is offered as well."""
    whole: dict[tuple[str, str], Remake] = {}
    parts: list[tuple[Remake, str, int]] = []
    for remake in filter(moves, brought):
        codec, quarters = part_of(codec_of(remake.pack[0]))
        if quarters == WHOLE:
            whole[remake.value, codec] = remake
        else:
            parts.append((remake, codec, quarters))
    found: dict[str, float] = {}
    for remake, codec, quarters in parts:
        ways = zip(waits_of(remake), _steps(remake), _steps(whole[remake.value, codec]), strict=True)
        for wait, part, full in ways:
            found[wait] = max(0.0, seconds[part.name] - quarters / WHOLE * seconds[full.name])
    return found


def _steps(remake: Remake) -> tuple[Step, ...]:
    return remake.pack + remake.unpack


def _filled(remake: Remake, costs: Mapping[str, OpCost]) -> Remake:
    pack, unpack = (
        tuple(replace(step, workspace=costs[step.name].workspace) for step in steps)
        for steps in (remake.pack, remake.unpack)
    )
    seconds = sum(costs[step.name].seconds for step in (*pack, *unpack))
    return replace(remake, pack=pack, unpack=unpack, seconds=seconds)
