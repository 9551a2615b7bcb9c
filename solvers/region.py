"""What the copies of one backward region hold, step by step: the inner loop of `memopt.solvers.space`.

Time is counted in halves: 2 t is the moment just before step t, when copies are made in a burst; 2 t + 1 is step t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple


class Maker(NamedTuple):
    """The step that makes a value: position, values it reads and creates, bytes of workspace, seconds, fused or not.
    unpacks: its name if it is no step of the graph but unpacks the value, whose own maker then stands at `at`.
    stand_in: what it makes is not for copies to read. inlined: what it makes is not stored for fused steps."""

    at: int
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    workspace: int
    seconds: float
    fused: bool = False
    unpacks: str = ""
    stand_in: bool = False
    inlined: bool = False


@dataclass(frozen=True)
class Work:
    """What a region's copies do. held: (from, to, bytes), half-times, both included; bursts: (half-time, bytes above
    what stood before); extends: original value -> last half-time a copy reads it; used: ways really taken."""

    held: tuple[tuple[int, int, int], ...]
    bursts: tuple[tuple[int, int], ...]
    extends: Mapping[int, int]
    seconds: float
    used: tuple[int, ...]


class Walk:
    """Places copies as `memopt.edit.Placer` does: lazily, before the first read, with what they read in turn.

    remade: value -> the way it is remade. offered: ways there are here. loose: values that a step here reads which is
    not fused.
    """

    def __init__(
        self, makers: Mapping[int, Maker], size: Sequence[int], remade: Mapping[int, int], offered: Set[int],
        loose: Set[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.makers, self.size, self.remade, self.offered = makers, size, remade, offered
        self.stored = set(loose)  # values that would not vanish: what a copy reads is taken to be stored
        self.born: dict[int, int] = {}
        self.taken: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.extends: dict[int, int] = {}
        self.bursts: list[tuple[int, list[Maker]]] = []
        self.seconds = 0.0

    def run(self, reads: Sequence[tuple[int, tuple[int, ...]]]) -> Work:
        for at, values in reads:
            wanted = [v for v in values if v in self.remade]
            if any(v not in self.born for v in wanted):
                self.burst(wanted, 2 * at)
            for v in wanted:
                self.last[v] = 2 * at + 1
        for v in self.born:
            if self.vanishes(v):
                self.extends.update({u: max(self.extends[u], self.last[v]) for u in self.makers[self.taken[v]].reads})
        stored = ((v, b) for v, b in self.born.items() if not self.vanishes(v))
        held = tuple((b + 1, self.last[v], self.size[v]) for v, b in stored if self.last[v] > b)
        tops = tuple((when, self.top(when, makers)) for when, makers in self.bursts)
        return Work(held, tops, self.extends, self.seconds, tuple(self.taken.values()))

    def burst(self, wanted: Sequence[int], when: int) -> None:
        needed: dict[tuple[int, str], Maker] = {}
        stack = [v for v in wanted if v not in self.born]
        while stack:
            maker = self.makers[self.remade[stack.pop()]]
            if (maker.at, maker.unpacks) not in needed:
                needed[maker.at, maker.unpacks] = maker
                stack.extend(u for u in maker.reads if self.readable(u) and u not in self.born)
        order = [needed[place] for place in sorted(needed)]
        for maker in order:
            self.copy(maker, when)
        self.bursts.append((when, order))

    def vanishes(self, v: int) -> bool:
        """Whether each step that reads this copy unpacks it for itself."""
        return self.makers[self.taken[v]].inlined and v not in self.stored

    def readable(self, u: int) -> bool:
        """Whether copies read a copy of this value, and not the original."""
        return u in self.remade and not self.makers[self.remade[u]].stand_in

    def copy(self, maker: Maker, when: int) -> None:
        self.seconds += maker.seconds
        for u in maker.reads:
            if u in self.born and self.readable(u):
                self.last[u] = max(self.last[u], when)
                self.stored.add(u)
            else:
                self.extends[u] = when
        for v in maker.makes:
            if v in self.remade and v not in self.born:
                self.born[v] = when
                self.last[v] = when
                # Made beside what was wanted of its own maker, it need not be unpacked.
                self.taken[v] = self.remade[v] if maker.unpacks or v not in self.offered else v

    def top(self, when: int, makers: Sequence[Maker]) -> int:
        """Most bytes above what stood before the burst: new copies, outputs nobody reads, workspace."""
        reader = {u: i for i, maker in enumerate(makers) for u in maker.reads}
        above = best = 0
        ending: dict[int, int] = {}
        for v, i in reader.items():
            if self.last.get(v) == when and not self.vanishes(v):
                ending[i] = ending.get(i, 0) + self.size[v]
        for i, maker in enumerate(makers):
            fresh = [v for v in maker.makes if self.born.get(v) == when and not self.vanishes(v)]
            made = 0 if maker.fused or (maker.inlined and not fresh) else sum(self.size[v] for v in maker.makes)
            best = max(best, above + made + maker.workspace)
            above += sum(self.size[v] for v in fresh if self.last[v] > when or v in reader) - ending.get(i, 0)
        return best
