"""Masks as bits: a boolean that the backward reads is saved eight to a byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memopt.graph import StepGraph
from memopt.kernels.codec import PACKED_BYTES
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable


@dataclass(frozen=True)
class PackMasks(Packing):
    """Save booleans (dropout's masks, what a relu let through) in an eighth of their bytes."""

    name, numerics = "pack_masks", Numerics.EXACT

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """One bit an element, rounded up to bytes."""
        masks = (value for value in packable(graph) if graph.tensors[value].dtype == "bool")
        sizes = ((value, graph.storages[value].nbytes) for value in masks)
        return {value: ("bits", PACKED_BYTES["bits"]((nbytes,), 1)) for value, nbytes in sizes if nbytes > 1}
