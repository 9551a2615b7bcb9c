"""Seconds of packing and unpacking where a compiler makes loops of them: generated once, timed, kept with other costs.

What an operation takes when it is called tells nothing of that: the reference is a dozen operations, which read and
write what the loops keep in registers. An unpack is timed in a kernel that reads it and stores fp32, so its time has
a store in it that other readers have anyway: never too little.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from memopt.graph import Step, TensorInfo
from memopt.kernels.codec import VERSION
from memopt.operations import overload
from memopt.runtime.opcost import OpCost, OpCosts, least

COUNT = 1 << 20  # elements timed


def loop_cost(meter: OpCosts, step: Step, value: TensorInfo) -> OpCost | None:
    """What the step costs for this value, by the element; None if it is not known and no time is left to measure."""
    key = f"loops {VERSION} of {step.op}({value.dtype})"
    if key not in meter.known:
        if meter.spent >= meter.seconds_limit:
            return None
        meter.known[key] = meter.fresh[key] = OpCost(seconds(step.op, getattr(torch, value.dtype)), 0, 0)
    return OpCost(meter.known[key].seconds * prod(value.shape) / COUNT, 0, 0)


def seconds(op: str, dtype: torch.dtype) -> float:
    """Of the code generated for `memopt.pack_*` or `memopt.unpack_*` of COUNT elements on this CPU."""
    pack = overload(op.replace(".unpack_", ".pack_"))
    with unset_fake_temporarily(), torch.no_grad():
        x = torch.arange(COUNT).to(dtype).view(-1, 1024)
        if op == str(pack):
            run = compiled(pack, x, x.stride())
            return least(lambda: run([x]), x.device)
        given = pack(x, x.stride())
        run = compiled(overload(op), given, list(x.shape), list(x.stride()), dtype)
        return least(lambda: run([given]), x.device)


def compiled(op: torch._ops.OpOverload, x: Tensor, *rest: Any) -> Callable[[list[Tensor]], Any]:
    """Inductor's code of the one operation; of what bytes are unpacked to as fp32: to store booleans is slow there."""
    from memopt.inductor import generate  # loads torch._inductor, which takes seconds

    graph, mode = fx.Graph(), FakeTensorMode()
    holder = graph.placeholder("x")
    node = graph.call_function(op, (holder, *rest))
    read = graph.call_function(torch.ops.prims.convert_element_type.default, (node, torch.float32))
    graph.output((read if x.dtype is torch.uint8 else node,))
    with mode:
        holder.meta["val"] = mode.from_tensor(x)
        node.meta["val"] = op(holder.meta["val"], *rest)
        read.meta["val"] = node.meta["val"].float()
    code = generate(fx.GraphModule({}, graph), False, 1, lambda name: False, built=True)
    call: Callable[[list[Tensor]], Any] = code.call
    return call
