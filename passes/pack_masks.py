"""Masks as bits: a boolean that the backward reads is saved eight to a byte."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.graph import StepGraph
from memopt.packing import Codec, Packing
from memopt.passbase import Numerics


@dataclass(frozen=True)
class PackMasks(Packing):
    """Save booleans (dropout's masks, what a relu let through) in an eighth of their bytes."""

    name, numerics = "pack_masks", Numerics.EXACT

    def codec(self, graph: StepGraph, value: str) -> Codec | None:
        """One bit an element, rounded up to bytes."""
        nbytes = graph.storages[value].nbytes
        return ("bits", -(-nbytes // 8)) if graph.tensors[value].dtype == "bool" and nbytes > 1 else None
