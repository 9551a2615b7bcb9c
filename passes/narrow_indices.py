"""Indices in the smallest integers that hold them: where a pooling found its maximum, what a sort or a top-k chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from memopt.graph import Step, StepGraph
from memopt.packing import Codec, Packing, packable
from memopt.passbase import Numerics

# Operations whose 64-bit output counts places in what they read: it is below the number of its elements (ATen).
INDEXING = frozenset({
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("fractional_max_pool2d", "sort", "topk", "argmax", "argmin", "argsort", "max", "min", "median", "mode"),
})  # fmt: skip
WIDTHS = (("uint8", 1, 2**8), ("int16", 2, 2**15), ("int32", 4, 2**31))  # codec, bytes an element, first it cannot hold


@dataclass(frozen=True)
class NarrowIndices(Packing):
    """Save 64-bit indices of known range in 8, 16 or 32 bits."""

    name, numerics = "narrow_indices", Numerics.EXACT

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """The narrowest type by the elements that the indices count in."""
        indices = (value for value in packable(graph) if graph.tensors[value].dtype == "int64")
        found = ((value, narrowest(graph, value)) for value in indices)
        return {value: codec for value, codec in found if codec is not None}


def narrowest(graph: StepGraph, value: str) -> Codec | None:
    """The codec of the smallest integers that hold these; None where their range is not known."""
    maker, count = graph.steps[graph.uses[value][0]], prod(graph.tensors[value].shape)
    if not indexing(maker):
        return None
    limit = places(graph, maker)
    return next(((name, count * size) for name, size, beyond in WIDTHS if limit <= beyond), None)


def indexing(step: Step) -> bool:
    """Whether its integers are places in what it reads."""
    return step.op.split(".")[:1] == ["aten"] and step.op.split(".")[1] in INDEXING


def places(graph: StepGraph, step: Step) -> int:
    """Elements of the largest tensor it reads: all its indices are below."""
    return max(prod(graph.tensors[name].shape) for name in step.reads)
