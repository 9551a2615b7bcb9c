"""The input of a linear layer, where the gradient of a weight alone reads it, as a sample. Lossy: by consent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from memopt.graph import StepGraph
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable, packed_bytes
from memopt.passes.quantise import worth

PRODUCT = "aten.mm.default"


@dataclass(frozen=True)
class Sampled(Packing):
    """Save a sample of what late steps read in matrix products alone, once each. Assumes: the gradient is linear in it.
    What is computed again from the value is computed from the value itself (`Remake.stand_in`)."""

    numerics, stand_in = Numerics.LOSSY, True
    codec_name: ClassVar[str]

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """The codec for every such value."""
        taken = [value for value in packable(graph) if multiplied(graph, value) and worth(graph.tensors[value])]
        return {v: (self.codec_name, packed_bytes(self.codec_name, graph.tensors[v])) for v in taken}


def multiplied(graph: StepGraph, value: str) -> bool:
    """Whether all that the backward does with a value is to multiply it, as one factor, into a weight's gradient."""
    late = [graph.steps[at] for at in graph.uses[value] if at >= graph.boundary and at not in graph.viewing]
    return bool(late) and all(
        step.op == PRODUCT and sum(graph.storage_of(name) == value for name in step.reads) == 1 for step in late
    )


@dataclass(frozen=True)
class WtaCrs(Sampled):
    """A quarter of the rows, the largest for sure, others drawn: unbiased."""

    name, codec_name = "wta_crs", "rows"


@dataclass(frozen=True)
class CompAct(Sampled):
    """A quarter of the columns of a random projection: unbiased."""

    name, codec_name = "compact", "projected"
