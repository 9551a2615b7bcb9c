"""Quantised saving: what the backward reads of the forward, kept in 8, 4 or 2 bits. Lossy: only by consent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from memopt.graph import Step, StepGraph, TensorInfo
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable, packed_bytes

FLOATS = frozenset({"float32", "bfloat16", "float16"})
STATISTIC = 1 / 32  # of what it was taken of, at most: rows are longer than that
FEWEST = 4096  # elements of a value that is worth it


@dataclass(frozen=True)
class Quantised(Packing):
    """Quantise values of the forward that a backward step itself reads. Assumes: they are what a batch made them.

    Left alone: what does not depend on the inputs (weights and their casts), statistics (further outputs of a step,
    tensors whose last dimension is 1) and small values. What is recomputed of a quantised value is not exact either.
    """

    numerics = Numerics.LOSSY
    codec_name: ClassVar[str]

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """The pair of operations for every value it may take and makes smaller."""
        taken = quantisable(graph)
        sizes = {v: packed_bytes(self.codec_name, graph.tensors[v]) for v in packable(graph) if v in taken}
        return {v: (self.codec_name, nbytes) for v, nbytes in sizes.items() if nbytes < graph.storages[v].nbytes}


def quantisable(graph: StepGraph) -> set[str]:
    """Storages that depend on a batch, are their step's first output, and are read by the backward itself.

    Of a fused step all outputs are taken but its statistics, which are a STATISTIC of its largest tensor or less."""
    batch = {name for name in graph.input_storages if graph.storages[name].kind == "input"}
    found: set[str] = set()
    for step in graph.steps[: graph.boundary]:
        if any(graph.storage_of(name) in batch for name in step.reads):
            batch.update(graph.storage_of(name) for name in step.writes)
            first = wide(graph, step) if step.fused else step.writes[:1]
            found.update(name for name in first if name in graph.storages and worth(graph.tensors[name]))
    return {name for name in found if read_by_backward(graph, name)}


def wide(graph: StepGraph, step: Step) -> tuple[str, ...]:
    """What the step writes that is no statistic of something else that it makes or reads of the batch."""
    read = (name for name in step.reads if graph.storages[graph.storage_of(name)].kind != "parameter")
    sizes = {name: prod(graph.tensors[name].shape) for name in (*read, *step.writes)}
    return tuple(name for name in step.writes if sizes[name] > STATISTIC * max(sizes.values()))


def worth(info: TensorInfo) -> bool:
    """Large enough, and no statistic of something larger."""
    return info.dtype in FLOATS and prod(info.shape) >= FEWEST and info.shape[-1] > 1


def read_by_backward(graph: StepGraph, value: str) -> bool:
    """Whether a step of the backward reads it, not only looks at it."""
    late = (at for at in graph.uses[value] if at >= graph.boundary)
    return any(at not in graph.viewing for at in late)


@dataclass(frozen=True)
class Int8Activations(Quantised):
    """256 levels a group, rounded stochastically: unbiased."""

    name, codec_name = "int8_activations", "int8"


@dataclass(frozen=True)
class Int4Activations(Quantised):
    """16 levels a group, rounded stochastically: unbiased."""

    name, codec_name = "int4_activations", "int4"


@dataclass(frozen=True)
class Int2Activations(Quantised):
    """4 levels a group, rounded stochastically: unbiased."""

    name, codec_name = "int2_activations", "int2"


@dataclass(frozen=True)
class Fp8Activations(Quantised):
    """Three bits of mantissa at any magnitude, rounded to nearest."""

    name, codec_name = "fp8_activations", "fp8"
