"""Seconds of a step: a roofline from a device's published rates, or a table of measured seconds.

A cost model is one call, `seconds(graph, step)`. Its law: never negative, additive over steps, equal for equal keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

from memopt.devices import Device
from memopt.edit import HOST
from memopt.graph import Step, StepGraph
from memopt.overlap import FETCH, MOVE, START, STATE
from memopt.tokens import moved, part_of


class CostModel(Protocol):
    """Prices one step at a time."""

    def seconds(self, graph: StepGraph, step: Step) -> float:
        """Predicted seconds of one run of `step`."""
        ...


def moved_bytes(graph: StepGraph, step: Step) -> int:
    """Bytes a step reads and writes: each tensor once. A pure view moves none."""
    if is_view(graph, step):
        return 0
    return sum(_tensor_bytes(graph, name) for name in (*dict.fromkeys(step.reads), *step.writes))


def is_view(graph: StepGraph, step: Step) -> bool:
    """Writes only into storages it reads, and is pure: metadata alone, no kernel."""
    return step.pure and bool(step.writes) and not graph.created(step)


def codec_of(step: Step) -> str:
    """The codec of a step that packs or unpacks a value (memopt/kernels/codec.py); '' for any other."""
    return step.op.partition("pack_")[2].removesuffix(".default") if step.op.startswith("memopt.") else ""


def _tensor_bytes(graph: StepGraph, name: str) -> int:
    info = graph.tensors[name]
    count = 1
    for size in info.shape:
        count *= size
    return min(count * ITEMSIZE.get(info.dtype, 4), graph.storages[info.storage].nbytes)


def main_dtypes(graph: StepGraph, step: Step) -> set[str]:
    """Dtypes of the step's tensors that have an eighth of the largest one's elements or more.

    The rest rides along: the fp32 logsumexp of bf16 attention does not make its matrix products fp32.
    """
    counts = {name: prod(graph.tensors[name].shape) for name in (*step.reads, *step.writes)}
    least = max(counts.values(), default=0) / 8
    return {graph.tensors[name].dtype for name, count in counts.items() if count >= least}


ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8,
    "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Roofline:
    """max(flops / peak rate, bytes / bandwidth) + launch (Williams et al., 2009, doi:10.1145/1498765.1498785).

    The rate is that of the widest dtype among the step's main tensors; the device says which share of its rates a good
    kernel reaches. disk: bytes a second of writing to disk and of reading back, where the optimizer's state lies there.
    """

    device: Device
    disk: tuple[float, float] | None = None

    def seconds(self, graph: StepGraph, step: Step) -> float:
        if is_view(graph, step):
            return 0.0
        if step.op == MOVE:  # and its way back, for the update reads it where it lies
            out, back = self.disk or (self.device.device_to_host, self.device.host_to_device)
            return _tensor_bytes(graph, step.reads[0]) * (1 / out + 1 / back)
        if step.op.endswith(STATE):
            return self._moving(graph, step)
        codec = codec_of(step)
        if codec in self.device.codecs or codec.startswith(HOST):
            return self._packing(graph, step, codec) + self.device.launch_seconds
        compute = step.flops / self.device.flops(main_dtypes(graph, step)) if step.flops else 0.0
        memory = moved_bytes(graph, step) / self.device.memory_bandwidth
        return max(compute, memory) / self.device.efficiency + self.device.launch_seconds

    def _moving(self, graph: StepGraph, step: Step) -> float:
        """Seconds of moving a part of the optimizer's state between its home and the device; none of waiting for it."""
        out, back = self.disk or (self.device.device_to_host, self.device.host_to_device)
        if step.op.startswith(FETCH):
            return _tensor_bytes(graph, step.writes[0]) / back
        return _tensor_bytes(graph, step.reads[1]) / out if step.op.startswith(START) else 0.0  # behind its home

    def _packing(self, graph: StepGraph, step: Step, codec: str) -> float:
        packing = step.op.startswith("memopt.pack_")
        value = (step.reads if packing else step.writes)[0]
        if codec.startswith(HOST):
            link = self.device.device_to_host if packing else self.device.host_to_device
            nbytes = _tensor_bytes(graph, value)
            gone = moved(nbytes, part_of(codec)[1])
            return gone / link + 2 * (nbytes - gone) / self.device.memory_bandwidth  # the rest is read and written
        return prod(graph.tensors[value].shape) / self.device.codecs[codec][0 if packing else 1]


@dataclass(frozen=True)
class Measured:
    """Seconds by `Step.key`, measured on the device that will run the step; `other` answers for unseen keys."""

    table: Mapping[str, float]
    other: CostModel = field(repr=False)

    def seconds(self, graph: StepGraph, step: Step) -> float:
        found = self.table.get(step.key)
        return self.other.seconds(graph, step) if found is None else found
