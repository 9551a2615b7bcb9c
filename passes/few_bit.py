"""Few-bit backwards: what a nonlinearity's backward alone reads is kept as a code of its slope. Lossy: by consent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from memopt.graph import Step, StepGraph
from memopt.kernels.codec import PACKED_BYTES
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable, packed_bytes
from memopt.passes.quantise import worth

# backward operation (gradient, saved) -> the nonlinearity
READERS = {f"aten.{name}_backward.default": name for name in ("gelu", "silu", "tanh", "sigmoid")}


@dataclass(frozen=True)
class Slopes(Packing):
    """Keep a few bits an element of what only the backward of some nonlinearities reads. Assumes: it reads the slope
    alone. What is computed again from the value is computed from the value itself (`Remake.stand_in`).

    Under Inductor they are captured whole for it (memopt/kernels/lowered_slopes.py).
    """

    numerics, stand_in = Numerics.LOSSY, True
    code: ClassVar[str]

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """The codec of the nonlinearity that reads it, for every such value that has one."""
        found = {value: f"{self.code}_{name}" for value, name in read_for_slope(graph).items()}
        return {v: (c, packed_bytes(c, graph.tensors[v])) for v, c in found.items() if c in PACKED_BYTES}


@dataclass(frozen=True)
class FewBit(Slopes):
    """3 bits of GELU, SiLU, tanh and sigmoid: the eight levels nearest to the slope."""

    name, code = "fewbit", "fewbit"


@dataclass(frozen=True)
class ApproxBP(Slopes):
    """2 bits of GELU and SiLU: the slope of the sum of three ReLUs nearest to them."""

    name, code = "approx_bp", "approx"


def read_for_slope(graph: StepGraph) -> dict[str, str]:
    """Value -> nonlinearity, where all that the backward does with a value is to take its slope there."""
    found: dict[str, str] = {}
    for value in packable(graph):
        late = [graph.steps[at] for at in graph.uses[value] if at >= graph.boundary and at not in graph.viewing]
        names = {_nonlinearity(graph, step, value) for step in late}
        name = names.pop() if len(names) == 1 else ""
        if name and worth(graph.tensors[value]):
            found[value] = name
    return found


def _nonlinearity(graph: StepGraph, step: Step, value: str) -> str:
    """Of a step that reads the value as what a nonlinearity saved, and as nothing else; '' for any other."""
    at = [place for place, name in enumerate(step.reads) if graph.storage_of(name) == value]
    return READERS.get(step.op, "") if at == [1] else ""
