"""A step of one or several graphs rehearsed as it will run: forwards in order, backwards in reverse, one ledger.

What one graph's code returns is what the next is given, laid out as the code chose; what is saved, held by the frames
of the forward or by autograd's engine lives as memopt/joints.py says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memopt.inductor import Half
from memopt.joints import Part
from memopt.runtime.rehearse import Ledger, Workspace, perform, stand_ins


@dataclass(frozen=True)
class Leg:
    """One run of a graph, compiled. backward: None if the graph has none."""

    part: Part
    forward: Half
    backward: Half | None

    def name(self, node: str) -> str:
        """The tensor's name in the step."""
        return self.part.prefix + node


@dataclass
class Relay:
    """The rehearsal. held: outputs that the caller keeps through the backward; seeds: tangents it holds (tensor names).

    passing: what the frames of the forward hold; saved: by leg; arrived: gradient waiting for a tangent.
    """

    legs: Sequence[Leg]
    held: frozenset[str]
    seeds: frozenset[str]
    ledger: Ledger
    passing: dict[str, Any] = field(default_factory=dict)
    saved: list[dict[str, Any]] = field(default_factory=list)
    arrived: dict[str, Any] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    def run(self) -> tuple[int, int]:
        """Peak bytes of the forwards and of the backwards, without what the caller gave."""
        for leg in self.legs:
            self.forward(leg)
        front = self.ledger.peak
        self.kept += [value for name, value in self.passing.items() if name in self.held]
        self.passing.clear()
        self.ledger.settle()
        self.ledger.peak = self.ledger.held
        for leg in reversed(self.legs):
            self.backward(leg)
        return front, self.ledger.peak

    def forward(self, leg: Leg) -> None:
        half, taken = leg.forward, leg.part.received
        fresh = stand_ins(half.values, [taken.get(leg.name(n)) == "" for n in half.names], self.ledger)
        given = [self.passing.get(taken.get(leg.name(n), ""), new) for n, new in zip(half.names, fresh, strict=True)]
        self.passing.update((leg.name(n), value) for n, value in zip(half.names, given, strict=True))
        made = dict(zip(half.returns, perform(half.call, list(given), self.ledger), strict=True))
        wanted = {*leg.part.graph.outputs, *self.held}
        self.passing.update((leg.name(n), value) for n, value in made.items() if leg.name(n) in wanted)
        names = leg.backward.names if leg.backward is not None else ()
        self.saved.append({name: made[name] for name in names if name in made})

    def backward(self, leg: Leg) -> None:
        saved = self.saved.pop()
        if leg.backward is None:
            return
        half = leg.backward
        given = [
            saved[name] if name in saved else self.tangent(leg, name, value)
            for name, value in zip(half.names, half.values, strict=True)
        ]
        saved.clear()
        self.ledger.settle()
        self.ledger.peak = max(self.ledger.peak, self.ledger.held)
        made = dict(zip(half.returns, perform(half.call, given, self.ledger), strict=True))
        self.hand_over(leg, {leg.name(name): value for name, value in made.items()})

    def tangent(self, leg: Leg, name: str, value: Any) -> Any:
        """The gradient that arrived, or one that comes to life."""
        came = self.arrived.pop(leg.name(name), None)
        made = stand_ins([value], [True], self.ledger)[0] if came is None else came
        if leg.name(name) in self.seeds:
            self.kept.append(made)
        return made

    def hand_over(self, leg: Leg, made: Mapping[str, Any]) -> None:
        """First gradients wait for their tangent, further ones are added to them; a parameter's stay.

        Added in place, unless what waits is shared: as `memopt.joints.Joiner.add` says it.
        """
        for sent in leg.part.sent:
            gradient = made.get(sent.gradient)
            if not sent.target:
                self.kept.append(gradient)
            elif sent.target not in self.arrived:
                self.arrived[sent.target] = gradient if sent.fits else None
            elif self.shared(self.arrived[sent.target]):
                self.arrived[sent.target] = stand_ins([gradient], [True], self.ledger)[0]

    def shared(self, waiting: Any) -> bool:
        """Whether several gradients wait in the storage of this one."""
        if waiting is None:
            return False
        home: int = waiting.untyped_storage()._cdata
        others = (other.untyped_storage()._cdata for other in self.arrived.values() if other is not None)
        return len([other for other in others if other == home]) > 1


def rehearsed(
    legs: Sequence[Leg], held: frozenset[str], seeds: frozenset[str], needs: Workspace, block: int
) -> tuple[int, int]:
    """Peak bytes of the forwards and of the backwards; see Relay. needs: of library calls. block: of the allocator."""
    return Relay(legs, held, seeds, Ledger(needs, block)).run()
