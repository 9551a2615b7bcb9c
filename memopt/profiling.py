"""Operations of the captured programs priced on the device that will run them: seconds and workspace by cost key."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from memopt.cost import ITEMSIZE, codec_of
from memopt.devices import Device
from memopt.edit import DISK, HOST
from memopt.facts import cost_key
from memopt.graph import Step, TensorInfo
from memopt.kernels.codec import INLINED
from memopt.operations import overload
from memopt.overlap import UNPACK
from memopt.pipeline import Costs
from memopt.program import Program
from memopt.runtime import disk, rows
from memopt.runtime.libraries import kept_by_libraries
from memopt.runtime.loops import loop_cost
from memopt.runtime.opcost import OpCost, OpCosts, called
from memopt.runtime.opinputs import fake_arguments
from memopt.runtime.rng import draw
from memopt.tokens import elsewhere, moved, part_of

MESSAGES = (rows.GATHER_ROWS, rows.MEAN_ROWS)
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
SECONDS = 30.0  # time limit of measuring; operations left over are priced by the roofline


def measured_costs(programs: Iterable[Program], device: Device, measure: bool, lowering: str = "eager") -> Costs:
    """What is known of the programs' operations on this device, if it is here.

    measure: run those not yet known, each once, on tensors of their own; otherwise only what earlier runs stored.
    lowering: under Inductor what packs is loops of the compiler. On a GPU its operations are kernels and as fast.
    """
    programs = list(programs)
    messages = _messages(calls(programs), device)
    if device.kind == "cuda" and not torch.cuda.is_available():
        return messages
    channels_last = lowering == "inductor" and device.kind == "cpu" and torch.backends.mkldnn.is_available()
    every = calls(programs)
    alone = [node for node in every if not elsewhere(stored_in(node)) and node.target not in MESSAGES]
    run = {cost_key(node): as_run(node, channels_last) for node in alone}
    with OpCosts(device.kind, seconds_limit=SECONDS if measure else 0.0) as meter:
        known = meter.measure_all(run.values())
    found = {key: known[own] for key, node in run.items() if (own := cost_key(node)) in known}
    read = {cost_key(node): read_seconds(node) for node in every if stored_in(node).startswith(DISK)}
    workspaces = {key: cost.workspace for key, cost in found.items() if cost.workspace > 0}
    libraries = kept_by_libraries(torch.device(device.kind)) if measure else 0
    packing = partial(_packing, meter, lowering == "inductor" and device.kind == "cpu")
    seconds = {**{key: cost.seconds for key, cost in found.items()}, **read, **messages.seconds}
    return Costs(seconds, {**workspaces, **messages.workspaces}, libraries, packing)


def _messages(nodes: Iterable[fx.Node], device: Device) -> Costs:
    """Of operations in which ranks send each other rows: by ring algorithms each rank sends all rows but its own, here
    at the rate of the link to the host, as between cards on one bus. A rank cannot measure them by itself."""
    seconds, workspaces = {}, {}
    for node in nodes:
        if node.target in MESSAGES:
            args, _ = fake_arguments(node)
            whole = node.meta["val"] if node.target is rows.GATHER_ROWS else args[0]
            size = rows.MESHES[args[2 if node.target is rows.GATHER_ROWS else 1]].size
            seconds[cost_key(node)] = whole.nbytes * (size - 1) / size / device.host_to_device + device.launch_seconds
            workspaces[cost_key(node)] = rows.workspace(node.target, args) or 0
    return Costs(seconds, workspaces)


def stored_in(node: fx.Node) -> str:
    """The codec of what the program itself unpacks: a frozen weight (memopt/weights.py); '' of any other operation."""
    name = str(node.target)
    return name.removeprefix(UNPACK).removesuffix(".default") if name.startswith(UNPACK) else ""


def read_seconds(node: fx.Node) -> float:
    """Of a weight that lies on disk, by the rates of its folder."""
    known, value = disk.pool_of(stored_in(node)).rates(), node.meta["val"]
    return float(known.least + value.nbytes / known.read)


def as_run(node: fx.Node, channels_last: bool) -> fx.Node:
    """The operation that will really run: behind a replayable draw, or a convolution of images in channels last, as
    Inductor lays all of them out on a CPU (GraphLowering.decide_layout_opt, torch/_inductor/graph.py)."""
    if node.target is draw:
        return undrawn(node)
    return laid_out(node) if channels_last and node.target in CONVOLUTIONS else node


def laid_out(node: fx.Node) -> fx.Node:
    """The same call, in a graph of its own, with images and their kernels in channels last: oneDNN computes on others
    only after it has copied them, which costs bytes and seconds."""

    def held(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
        return torch.empty(value.shape, dtype=value.dtype, device="meta", memory_format=layout)

    assert isinstance(node.target, torch._ops.OpOverload)
    args, kwargs = tree_map(held, fake_arguments(node))
    return called(node.target, args, kwargs)


def _packing(meter: OpCosts, loops: bool, step: Step, value: TensorInfo) -> OpCost | None:
    """What packing or unpacking a value costs, by a run of its own or what is remembered of one."""
    codec = codec_of(step)
    if codec.startswith(HOST):
        return None  # by the link's rate, which `memopt doctor --calibrate` measures
    if codec.startswith(DISK):
        return _on_disk(meter, step, value)
    with meter:
        if loops and codec in INLINED:
            return loop_cost(meter, step, value)
        return meter.measure(called(overload(step.op), _arguments(step, value), {}))


def _on_disk(meter: OpCosts, step: Step, value: TensorInfo) -> OpCost:
    """By the rates of the folder, and for what of the value stays by a copy of it."""
    codec, quarters = part_of(codec_of(step))
    known, count = disk.pool_of(codec).rates(), prod(value.shape)
    rate = known.write if step.op.startswith("memopt.pack_") else known.read
    seconds = known.least + moved(count, quarters) * ITEMSIZE[value.dtype] / rate
    if stays := count - moved(count, quarters):
        rest = torch.empty(stays, dtype=getattr(torch, value.dtype), device="meta")
        with meter:
            copied = meter.measure(called(torch.ops.aten.clone.default, (rest,), {}))
        seconds += copied.seconds if copied is not None else 0.0
    return OpCost(seconds, 0, 0)


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
