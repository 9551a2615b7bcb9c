"""Indices in the smallest integers that hold them: where a pooling found its maximum, what a sort or a top-k chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from memopt.graph import Step, StepGraph
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable

# Operation -> which of its outputs counts places in what it reads (ATen). Others of their outputs are values, which may
# be integers too and of any size.
INDEXING = {
    **dict.fromkeys(("max_pool2d_with_indices.default", "max_pool3d_with_indices.default"), 1),
    **dict.fromkeys(("adaptive_max_pool2d.default", "adaptive_max_pool3d.default"), 1),
    **dict.fromkeys(("fractional_max_pool2d.default", "fractional_max_pool3d.default"), 1),
    **dict.fromkeys(
        ("sort.default", "sort.stable", "topk.default", "max.dim", "min.dim", "median.dim", "mode.default"), 1
    ),
    **dict.fromkeys(("argmax.default", "argmin.default", "argsort.default", "argsort.stable"), 0),
}
POOLED = {"pool2d": 2, "pool3d": 3}  # last dimensions of the input that a pooling's indices count in, row by row
FLAT = ("argmax.default", "argmin.default")  # count in the whole tensor where no dimension is given
WIDTHS = (("uint8", 1, 2**8), ("int16", 2, 2**15), ("int32", 4, 2**31))  # codec, bytes an element, first it cannot hold


@dataclass(frozen=True)
class NarrowIndices(Packing):
    """Save 64-bit indices of known range in 8, 16 or 32 bits."""

    name, numerics = "narrow_indices", Numerics.EXACT

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """The narrowest type by the places that the indices count."""
        indices = (value for value in packable(graph) if graph.tensors[value].dtype == "int64")
        found = ((value, narrowest(graph, value)) for value in indices)
        return {value: codec for value, codec in found if codec is not None}


def narrowest(graph: StepGraph, value: str) -> Codec | None:
    """The codec of the smallest integers that hold these; None where their range is not known."""
    maker, count = graph.steps[graph.uses[value][0]], prod(graph.tensors[value].shape)
    if not indexing(maker, value):
        return None
    limit = places(graph, maker)
    return next(((name, count * size) for name, size, beyond in WIDTHS if limit <= beyond), None)


def indexing(step: Step, value: str) -> bool:
    """Whether these integers are places in what the step reads."""
    at = INDEXING.get(step.op.removeprefix("aten."))
    return at is not None and at < len(step.writes) and step.writes[at] == value


def places(graph: StepGraph, step: Step) -> int:
    """What all its indices are below: elements of a plane that is pooled, or of a tensor that is reduced to one place,
    else the size of a dimension, of the longest as the step does not say which."""
    op, shapes = step.op.removeprefix("aten."), [graph.tensors[name].shape for name in step.reads]
    pooled = next((dims for kind, dims in POOLED.items() if kind in op), 0)
    if pooled:
        return max(prod(shape[-pooled:]) for shape in shapes)
    if op in FLAT and prod(graph.tensors[step.writes[0]].shape) == 1:
        return max(map(prod, shapes))
    return max((max(shape, default=1) for shape in shapes), default=1)
