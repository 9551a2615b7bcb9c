"""Operations of the captured programs priced on the device that will run them: seconds and workspace by cost key."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from memopt.cost import ITEMSIZE, codec_of
from memopt.devices import Device
from memopt.edit import DISK, HOST
from memopt.facts import cost_key
from memopt.graph import Step, TensorInfo
from memopt.operations import overload
from memopt.pipeline import Costs
from memopt.program import Program
from memopt.runtime import disk
from memopt.runtime.libraries import kept_by_libraries
from memopt.runtime.opcost import OpCost, OpCosts, called
from memopt.runtime.rng import draw

SECONDS = 30.0  # time limit of measuring; operations left over are priced by the roofline


def measured_costs(programs: Iterable[Program], device: Device, measure: bool) -> Costs:
    """What is known of the programs' operations on this device, if it is here.

    measure: run those not yet known, each once, on tensors of their own; otherwise only what earlier runs stored.
    """
    if device.kind == "cuda" and not torch.cuda.is_available():
        return Costs()
    nodes = calls(programs)
    with OpCosts(device.kind, seconds_limit=SECONDS if measure else 0.0) as meter:
        found = meter.measure_all(nodes)
        draws = {cost_key(node): meter.measure(undrawn(node)) for node in nodes if node.target is draw}
    found.update((key, cost) for key, cost in draws.items() if cost is not None)
    workspaces = {key: cost.workspace for key, cost in found.items() if cost.workspace > 0}
    libraries = kept_by_libraries(torch.device(device.kind)) if measure else 0
    return Costs({key: cost.seconds for key, cost in found.items()}, workspaces, libraries, partial(_packing, meter))


def _packing(meter: OpCosts, step: Step, value: TensorInfo) -> OpCost | None:
    """What packing or unpacking a value costs, by a run of its own or what is remembered of one."""
    codec = codec_of(step)
    if codec.startswith(HOST):
        return None  # by the link's rate, which `memopt doctor --calibrate` measures
    if codec.startswith(DISK):
        return _on_disk(step, value, disk.pool_of(codec).rates())
    with meter:
        return meter.measure(called(overload(step.op), _arguments(step, value), {}))


def _on_disk(step: Step, value: TensorInfo, known: disk.DiskRates) -> OpCost:
    """By the rates of the folder."""
    nbytes = prod(value.shape) * ITEMSIZE[value.dtype]
    rate = known.write if step.op.startswith("memopt.pack_") else known.read
    return OpCost(known.least + nbytes / rate, 0, 0)


def _arguments(step: Step, value: TensorInfo) -> tuple[Any, ...]:
    """Arguments of `memopt::pack_*` or `memopt::unpack_*` for a value, on the meta device."""
    dtype = getattr(torch, value.dtype)
    like = torch.empty(value.shape, dtype=dtype, device="meta")
    pack = overload(step.op.replace(".unpack_", ".pack_"))
    if step.op == str(pack):
        return like, like.stride()
    return pack(like, like.stride()), like.shape, like.stride(), dtype


def undrawn(node: fx.Node) -> fx.Node:
    """The random operation behind a replayable draw, in a graph of its own: it costs the same."""
    graph = fx.Graph()

    def held(arg: fx.Node) -> fx.Node:
        holder = graph.placeholder(arg.name)
        holder.meta["val"] = arg.meta["val"]
        return holder

    operation, _, _, *args = node.args
    twin = graph.call_function(operation, fx.map_arg(tuple(args), held), fx.map_arg(node.kwargs, held))  # type: ignore[arg-type]
    twin.meta["val"] = node.meta["val"]
    return twin


def calls(programs: Iterable[Program]) -> list[fx.Node]:
    """Every operation of the programs."""
    return [node for program in programs for node in program.graph.nodes if node.op == "call_function"]
