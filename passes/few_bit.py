"""Few-bit backward: what a nonlinearity's backward alone reads is kept as a code of its slope. Lossy: by consent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memopt.graph import Step, StepGraph
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable, packed_bytes
from memopt.passes.quantise import worth

# backward operation (gradient, saved) -> codec of what it saved
READERS = {
    "aten.gelu_backward.default": "fewbit_gelu",
    "aten.silu_backward.default": "fewbit_silu",
    "aten.tanh_backward.default": "fewbit_tanh",
    "aten.sigmoid_backward.default": "fewbit_sigmoid",
}


@dataclass(frozen=True)
class FewBit(Packing):
    """Keep 3 bits an element of what only the backward of GELU, SiLU, tanh or sigmoid reads. Assumes: it reads the
    slope alone. What is computed again from the value is computed from the value itself (`Remake.stand_in`).

    Under Inductor nothing is offered: the backwards of nonlinearities come decomposed there.
    """

    name, numerics, stand_in = "fewbit", Numerics.LOSSY, True

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """The codec of the nonlinearity that reads it, for every such value."""
        read = read_for_slope(graph)
        return {v: (codec, packed_bytes(codec, graph.tensors[v])) for v, codec in read.items()}


def read_for_slope(graph: StepGraph) -> dict[str, str]:
    """Value -> codec, where all that the backward does with a value is to take one nonlinearity's slope there."""
    found: dict[str, str] = {}
    for value in packable(graph):
        late = [graph.steps[at] for at in graph.uses[value] if at >= graph.boundary and at not in graph.viewing]
        codecs = {_codec(graph, step, value) for step in late}
        codec = codecs.pop() if len(codecs) == 1 else ""
        if codec and worth(graph.tensors[value]):
            found[value] = codec
    return found


def _codec(graph: StepGraph, step: Step, value: str) -> str:
    """Of a step that reads the value as what a nonlinearity saved, and as nothing else; '' for any other."""
    at = [place for place, name in enumerate(step.reads) if graph.storage_of(name) == value]
    return READERS.get(step.op, "") if at == [1] else ""
