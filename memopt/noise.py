"""What values saved inexactly do to the gradient: estimated a value, by classes of values that are made alike.

The relative error of a gradient is ||g' - g|| / ||g|| over all parameters. Roundings that are independent of each other
and unbiased add by their squares, so a value takes a square of the resource GRADIENT (memopt/edit.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

from memopt.cost import codec_of
from memopt.edit import GRADIENT, Remake
from memopt.graph import StepGraph
from memopt.kernels.codec import relative_error
from memopt.passbase import Numerics
from memopt.passes import TRADES

LOSSY = tuple(trade.name for trade in TRADES if trade.numerics is Numerics.LOSSY)  # each runs by consent only
Class = tuple[str, str]  # the operation that makes a value, and the user's line: alike in every layer, at every size


@dataclass(frozen=True)
class Noise:
    """measured: (class, codec) -> square of the relative error that one such value makes of the gradient
    (memopt.probe). scale: of all of them, where a plan was seen to be further off than its values by themselves."""

    measured: Mapping[tuple[Class, str], float] = field(default_factory=dict)
    scale: float = 1.0

    def of(self, remakes: Sequence[Remake], graph: StepGraph) -> tuple[Remake, ...]:
        """The remakes with their noise, but for those that ruin the gradient. graph: the step's real operations.

        What was not measured, or was without effect on that batch, is assumed: all values of a lever together are off
        by what its codec makes of normally distributed values, and share that alike.
        """
        offered = {(r.trade, r.value) for r in remakes if r.trade in LOSSY}
        counts = {trade: sum(1 for name, _ in offered if name == trade) for trade in LOSSY}
        noisy = (self._one(r, graph, counts) if r.trade in LOSSY else r for r in remakes)
        return tuple(r for r in noisy if all(isfinite(amount) for _, amount in r.takes))

    def _one(self, remake: Remake, graph: StepGraph, counts: Mapping[str, int]) -> Remake:
        codec = codec_of(remake.pack[0])
        found = self.measured.get((class_of(graph, remake.value), codec))
        square = self.scale * (found or relative_error(codec) ** 2 / counts[remake.trade])
        return replace(remake, takes=(*remake.takes, (GRADIENT, square)))


def class_of(graph: StepGraph, value: str) -> Class:
    """What makes the value, and where."""
    step = graph.steps[graph.uses[value][0]]
    return step.op, step.source
