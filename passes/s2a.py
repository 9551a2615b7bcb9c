"""S2A: four bits for what parameter-free operations save. Lossy: only by consent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memopt.edit import Remake
from memopt.graph import StepGraph
from memopt.passbase import Numerics, Trade
from memopt.passes.few_bit import Slopes, read_for_slope
from memopt.passes.packing import Codec
from memopt.passes.quantise import Int4Activations, of_batch


@dataclass(frozen=True)
class S2A(Trade):
    """Sixteen levels of a nonlinearity's slope, and int4 of what else no operation with parameters reads (Jin et al.,
    arXiv:2503.08154). A narrower consent than `int4_activations`."""

    name, numerics = "s2a", Numerics.LOSSY

    def propose(self, graph: StepGraph, seconds: Mapping[str, float]) -> tuple[Remake, ...]:
        return (*_Slopes().propose(graph, seconds), *_Values().propose(graph, seconds))


@dataclass(frozen=True)
class _Slopes(Slopes):
    name, code = S2A.name, "s2a"


@dataclass(frozen=True)
class _Values(Int4Activations):
    """What is computed again from a value is made of the value itself: an operation with parameters may read it."""

    name, label, stand_in = S2A.name, S2A.name, True

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        slopes, batch = read_for_slope(graph), of_batch(graph)
        found = super().codecs(graph)
        return {v: c for v, c in found.items() if v not in slopes and not meets_parameters(graph, v, batch)}


def meets_parameters(graph: StepGraph, value: str, batch: set[str]) -> bool:
    """Whether a step of the forward reads it beside a floating-point value that no batch made: a parameter, or one's
    cast. What a fused step makes it may read as well."""
    early = (graph.steps[at] for at in graph.uses[value] if at < graph.boundary)
    reading = (step for step in early if step.fused or value in map(graph.storage_of, step.reads))
    beside = {name for step in reading for name in step.reads if graph.storage_of(name) not in batch}
    return any("float" in graph.tensors[name].dtype for name in beside)
