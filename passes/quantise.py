"""Quantised saving: what the backward reads of the forward, kept in 8, 4 or 2 bits. Lossy: only by consent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from memopt.graph import Step, StepGraph, TensorInfo
from memopt.kernels.quantise import CODECS
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
        codecs = {v: self.by_head(graph, v) for v in packable(graph) if v in taken}
        sizes = {v: (codec, packed_bytes(codec, graph.tensors[v])) for v, codec in codecs.items()}
        return {v: codec for v, codec in sizes.items() if codec[1] < graph.storages[v].nbytes}

    def by_head(self, graph: StepGraph, value: str) -> str:
        """The codec, in groups that span no two of attention's heads where they lie side by side (per head, as Mesa,
        arXiv:2111.11124)."""
        width = beside(graph, value)
        narrow = f"{self.codec_name}_{width & -width}"  # the largest power of two that divides it
        return narrow if narrow in CODECS else self.codec_name


def quantisable(graph: StepGraph) -> set[str]:
    """Storages that depend on a batch, are their step's first output, and are read by the backward itself.

    Of a fused step all outputs are taken but its statistics, which are a STATISTIC of its largest tensor or less."""
    batch, found = of_batch(graph), set[str]()
    for step in graph.steps[: graph.boundary]:
        if any(graph.storage_of(name) in batch for name in step.reads):
            first = wide(graph, step) if step.fused else step.writes[:1]
            found.update(name for name in first if name in graph.storages and worth(graph.tensors[name]))
    return {name for name in found if read_by_backward(graph, name)}


def of_batch(graph: StepGraph) -> set[str]:
    """The storages of the inputs, and of what the forward makes of them."""
    batch = {name for name in graph.input_storages if graph.storages[name].kind == "input"}
    for step in graph.steps[: graph.boundary]:
        if any(graph.storage_of(name) in batch for name in step.reads):
            batch.update(graph.storage_of(name) for name in step.writes)
    return batch


def beside(graph: StepGraph, value: str) -> int:
    """Elements of a head, where a view of the storage is (..., heads, rows, columns) and one head's columns lie behind
    another's in memory, as all of a token's do that one product makes; 0: nowhere."""
    views = (graph.tensors[name] for name in graph.made_in[value])
    return min((info.shape[-1] for info in views if _crosses_rows(info)), default=0)


def _crosses_rows(info: TensorInfo) -> bool:
    """Whether the next row in memory is the next one of a dimension before the rows."""
    if info.stride[-1:] != (1,) or info.shape[-2:-1] == (1,):
        return False
    outer = zip(info.shape[:-2], info.stride[:-2], strict=True)
    return any(size > 1 and step == info.shape[-1] for size, step in outer)


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
