"""The choices of a problem as numbers: which offer covers which reads, and a fast simulation of any subset.

Offers whose spans fall into disjoint regions can be simulated region by region, and a region's copies depend on the
offers chosen in it alone: results are cached by that subset, so trying a change costs one region. A value may have
several ways of being remade: way 0 runs its own step again and bears the value's number; each further one unpacks
something that was packed when the value was made, a value of its own which lives only where a copy reads it. The
simulation follows `memopt.edit` but keeps forward steps that lose all readers (edit drops them) and frees an original
that only copies still read after the whole burst: its bytes and seconds are never below the edited graph's. Every final
answer is simulated by `edit` itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from memopt.edit import Remake, packed_behind, workspace_again
from memopt.plans import ROUNDING, Problem
from memopt.solvers.region import Maker, Walk, Work
from memopt.timeline import rounded

Parts = tuple[frozenset[int], ...]  # ways taken, by region
TOO_MUCH = 1 << 60  # bytes counted at each moment of a choice that takes more of a resource than there is


@dataclass
class Region:
    """A span of late steps. offers: way -> offer index. values: those offered here, each with its ways.
    reads: (position, values offered here and read there). loose: of them those read by a step that is not fused."""

    first: int
    last: int
    offers: dict[int, int] = field(default_factory=dict)
    values: dict[int, list[int]] = field(default_factory=dict)
    reads: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    loose: set[int] = field(default_factory=set)

    @property
    def again(self) -> set[int]:
        """Values whose own step may run again here."""
        return self.offers.keys() & self.values.keys()


@dataclass(frozen=True)
class State:
    """A simulated subset: peak bytes, the half-time of the peak, added seconds."""

    parts: Parts
    peak: int
    at: int
    seconds: float


@dataclass(frozen=True)
class Packed:
    """What a value was packed into. name: of the step that packs. source: that value. born: half-time of the packing.
    workspace: bytes it takes. seconds: of the packing. takes: as of its remakes."""

    name: str
    source: int
    born: int
    workspace: int
    seconds: float
    takes: dict[str, float]


@dataclass(frozen=True, slots=True)
class Simulated:
    """A region's work as tables of two rows. ends: values, half-times after which their originals are free here.
    copies, bursts: half-times, bytes from then on, and bytes at that moment alone."""

    work: Work
    ends: np.ndarray
    copies: np.ndarray
    bursts: np.ndarray


def joined(tables: list[np.ndarray]) -> np.ndarray:
    """All of them as one."""
    return np.concatenate(tables, axis=1) if tables else np.zeros((2, 0), np.int64)


class Space:
    """Index of one problem. Values are numbers, in the order storages are declared; offers keep their order."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.graph = problem, problem.graph
        graph = self.graph
        made = {storage.name: storage for remake in problem.remakes for _, storage in remake.made}
        storages = {**graph.storages, **made}
        self.number = {name: i for i, name in enumerate(storages)}
        self.size = [rounded(s.nbytes, problem.block) for s in storages.values()]
        self.steps = len(graph.steps)
        self.workspace = np.array([rounded(step.workspace, problem.block) for step in graph.steps], dtype=np.int64)
        self.uses: list[tuple[int, ...]] = [()] * len(self.size)
        for name, uses in graph.uses.items():
            self.uses[self.number[name]] = uses
        self._index_offers(problem.remakes)
        self._index_reads()
        self._known: list[dict[frozenset[int], Simulated]] = [{} for _ in self.regions]

    def _index_offers(self, offers: tuple[Remake, ...]) -> None:
        graph = self.graph
        spans = [(graph.position[r.span[0]], graph.position[r.span[1]]) for r in offers]
        self.regions = [Region(*span) for span in sorted(set(spans))]
        index = {(r.first, r.last): k for k, r in enumerate(self.regions)}
        self.separable = all(a.last < b.first for a, b in zip(self.regions, self.regions[1:], strict=False))
        self.makers: dict[int, Maker] = {}
        self.value_of: dict[int, int] = {}
        self.packed: dict[int, Packed] = {}
        named: dict[tuple[int, str], int] = {}
        for offer, (remake, span) in enumerate(zip(offers, spans, strict=True)):
            way, known = self._way(remake, named), self.regions[index[span]]
            self.separable &= way is not None and way not in known.offers
            if way is not None:
                known.offers[way] = offer
                known.values.setdefault(self.value_of[way], []).append(way)
        self.movable = {*self.value_of.values(), *self.packed}
        self.offered_in: dict[int, list[int]] = {}
        for k, region in enumerate(self.regions):
            for v in region.values:
                self.offered_in.setdefault(v, []).append(k)

    def _way(self, remake: Remake, named: dict[tuple[int, str], int]) -> int | None:
        """The way of this remake, indexed at first sight; None for one that this simulation does not know."""
        value = self.number[remake.value]
        plain = remake.repeats and remake.unpack[0].name in self.graph.position
        if not plain and not (len(remake.unpack) == len(remake.pack) == len(remake.made) == 1):
            return None
        way = value if plain else named.setdefault((value, remake.unpack[0].name), len(self.size) + len(named))
        if way not in self.makers:
            self.makers[way], self.value_of[way] = self.maker(remake), value
            if not plain:
                self._index_packed(remake, value)
        return way

    def _index_packed(self, remake: Remake, value: int) -> None:
        step = remake.pack[0]
        seconds, workspace = self.problem.seconds.get(step.name, 0.0), rounded(step.workspace, self.problem.block)
        packed = self.number[remake.made[0][1].name]
        born = 2 * packed_behind(self.graph, remake) + 2
        self.packed[packed] = Packed(step.name, value, born, workspace, seconds, dict(remake.takes))

    def maker(self, remake: Remake) -> Maker:
        step, graph, number = remake.unpack[0], self.graph, self.number
        new = {info.name: info.storage for info, _ in remake.made}
        reads = tuple(dict.fromkeys(number[new.get(r) or graph.storage_of(r)] for r in step.reads))
        makes = tuple(number[name] for name in (graph.created(step) if remake.repeats else (remake.value,)))
        at = graph.position[step.name] if remake.repeats else graph.uses[remake.value][0]
        workspace = rounded(workspace_again(graph, step), self.problem.block)
        seconds = self.problem.seconds.get(step.name, 0.0)
        name = "" if remake.repeats else step.name
        return Maker(at, reads, makes, workspace, seconds, step.fused, name, remake.stand_in, step.inlined)

    def _index_reads(self) -> None:
        """Per region the reads its offers may serve; per value and region the first and last such read."""
        graph, starts = self.graph, [region.first for region in self.regions]
        self.covered: dict[int, dict[int, tuple[int, int]]] = {v: {} for v in self.movable}
        for at, step in enumerate(graph.steps):
            k = bisect_right(starts, at) - 1
            if k < 0 or at > self.regions[k].last or graph.is_view(step):
                continue
            region = self.regions[k]
            read = dict.fromkeys(self.number[graph.storage_of(r)] for r in step.reads)
            served = tuple(v for v in read if v in region.values)
            if served:
                region.reads.append((at, served))
                region.loose.update(served if not step.fused else ())
            for v in served:
                self.covered[v][k] = (self.covered[v].get(k, (at, at))[0], at)
        self._covered_in = [
            {v: self.covered[v][k] for v in region.values if k in self.covered[v]}
            for k, region in enumerate(self.regions)
        ]
        self._index_lives()

    def _index_lives(self) -> None:
        """Half-times: births of all values; ends of those no choice moves; anchors of the others."""
        graph = self.graph
        held = {self.number[n] for n in (*graph.input_storages, *graph.output_storages)}
        given = {self.number[n] for n in graph.input_storages}
        births, ends = np.zeros(len(self.size), np.int64), np.zeros(len(self.size), np.int64)
        for v, uses in enumerate(self.uses):
            births[v] = 0 if v in given else 2 * uses[0] + 1 + graph.steps[uses[0]].fused if uses else 0
            ends[v] = 2 * self.steps if v in held else 2 * uses[-1] + 1 if uses else -1
        self.births, self.fixed_ends, self.held = births, ends, held
        self.anchor: dict[int, int] = {}
        for v in sorted({*self.value_of.values()}):
            inside = [(r.first, r.last) for r in self.regions if v in r.values]
            outside = [u for u in self.uses[v] if not any(a <= u <= b for a, b in inside)]
            self.anchor[v] = 2 * max(outside, default=self.uses[v][0]) + 1
        for v, packed in self.packed.items():  # nobody's, until a copy reads it
            births[v], self.anchor[v] = packed.born, packed.born - 1
        self.anchored = ends.copy()
        for v, anchor in self.anchor.items():
            self.anchored[v] = ends[v] if v in held else anchor
        self.sizes = np.array(self.size, dtype=np.int64)
        moved = {*self.movable, *(u for maker in self.makers.values() for u in maker.reads)}
        self._moved, others = (
            np.array([v for v in range(len(self.size)) if (v in moved) is at], np.int64) for at in (True, False)
        )
        self._steady = self._changes(others, self.anchored)
        self._packs = np.array(sorted(self.packed), np.int64)
        rows = [self.packed[v] for v in sorted(self.packed)]
        self._sources, self._packed_at = (np.array([getattr(p, n) for p in rows], np.int64) for n in ("source", "born"))
        self._pack_bytes = np.array([p.workspace for p in rows], np.int64)
        self._pack_seconds = np.array([p.seconds for p in rows])
        self._let_go = np.array([self.size[p.source] for p in rows], np.int64)
        self._takes = {name: np.array([p.takes.get(name, 0.0) for p in rows]) for name in self.problem.limits}
        self.limits = {n: limit for n, limit in self.problem.limits.items() if self._takes[n].sum() > limit}

    def with_ways(self, parts: Parts, v: int, taken: Callable[[int, frozenset[int]], frozenset[int]]) -> Parts:
        """These ways, but for value v those that taken(region, its ways there) gives wherever it is offered. The other
        regions' sets stay the same objects, whose simulation is then known at a glance."""
        changed = list(parts)
        for k in self.offered_in.get(v, ()):
            mine = frozenset(self.regions[k].values[v])
            changed[k] = (parts[k] - mine) | taken(k, mine)
        return tuple(changed)

    def covered_in(self, k: int) -> dict[int, tuple[int, int]]:
        """Values of region k read there by original steps -> first and last of those positions."""
        return self._covered_in[k]

    def work(self, k: int, remade: frozenset[int]) -> Work:
        """Simulate region k when these ways are taken in it."""
        return self._simulated(k, remade).work

    def _simulated(self, k: int, remade: frozenset[int]) -> Simulated:
        found = self._known[k].get(remade)
        if found is None:
            ways = {self.value_of[w]: w for w in sorted(remade, reverse=True)}  # of two the one offered first serves
            region = self.regions[k]
            work = Walk(self.makers, self.size, ways, region.offers.keys(), region.loose).run(region.reads)
            kept = {v: 2 * last + 1 for v, (_, last) in self._covered_in[k].items() if v not in ways}
            born = [(first, size) for first, _, size in work.held]
            dead = [(last + 1, -size) for _, last, size in work.held]
            tables = ([*kept.items(), *work.extends.items()], born + dead, work.bursts)
            found = Simulated(work, *(np.array(t, np.int64).reshape(-1, 2).T for t in tables))
            self._known[k][remade] = found
        return found

    def _all_simulated(self, parts: Parts) -> list[Simulated]:
        """Every region; what is known is looked up without a call, as it is a thousand times a second."""
        known = enumerate(zip(self._known, parts, strict=True))
        return [found.get(part) or self._simulated(k, part) for k, (found, part) in known]

    def ends(self, parts: Parts) -> np.ndarray:
        """Half-time after which each original is free: its anchor, or the last read that no copy serves."""
        return self._ends(self._all_simulated(parts))

    def _ends(self, regions: list[Simulated]) -> np.ndarray:
        """As `ends`, of regions that have been simulated."""
        ends = self.anchored.copy()
        np.maximum.at(ends, *joined([region.ends for region in regions]))
        if self.packed:
            packing = self.packing(ends)
            np.maximum.at(ends, self._sources[packing], self._packed_at[packing])
        return ends

    def packing(self, ends: np.ndarray) -> np.ndarray:
        """Which packed values, in ascending order, a copy reads."""
        return ends[self._packs] >= self._packed_at

    def bytes_at(self, parts: Parts) -> tuple[np.ndarray, float]:
        """Bytes at each half-time, the bursts' and workspaces included, and added seconds."""
        regions = self._all_simulated(parts)
        ends = self._ends(regions)
        delta = self._steady + self._changes(self._moved, ends)
        np.add.at(delta, *joined([region.copies for region in regions]))
        held = np.cumsum(delta)[: 2 * self.steps]
        held[1::2] += self.workspace
        when, size = joined([region.bursts for region in regions])
        held[when] += size
        seconds = sum([region.work.seconds for region in regions])
        if self.packed:
            packing = self.packing(ends)
            np.add.at(held, self._packed_at[packing], self._pack_bytes[packing])
            seconds += float(self._pack_seconds[packing].sum())
            if any(self._takes[n][packing].sum() > limit * (1 + ROUNDING) for n, limit in self.limits.items()):
                held += TOO_MUCH
        return held, seconds

    def _changes(self, values: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Bytes that these values' originals add at each half-time, and give back after their ends."""
        delta = np.zeros(2 * self.steps + 2, np.int64)
        alive = values[ends[values] >= self.births[values]]
        np.add.at(delta, self.births[alive], self.sizes[alive])
        np.subtract.at(delta, ends[alive] + 1, self.sizes[alive])
        return delta

    def within(self, parts: Parts) -> Parts:
        """The same ways, but for those that take most of a limit a byte, which go until all limits are kept: values are
        then remade by their own step if that is offered, else kept."""
        for _ in range(len(self._packs) if self.limits else 0):  # an own step may read what nobody unpacked before
            less = self._less(parts)
            if less == parts:
                break
            parts = less
        return parts

    def _less(self, parts: Parts) -> Parts:
        """These ways, less those that take too much as they stand."""
        packing = self.packing(self.ends(parts))
        for name, limit in self.limits.items():
            takes, room = self._takes[name], limit - float(self._takes[name][packing].sum())
            for at in sorted(np.flatnonzero(packing), key=lambda at: (-takes[at] / max(self._let_go[at], 1), at)):
                if room >= 0:
                    break
                if takes[at] > 0:
                    packing[at], room = False, room + takes[at]
                    parts = tuple(self._without(part, k, int(self._packs[at])) for k, part in enumerate(parts))
        return parts

    def _without(self, part: frozenset[int], k: int, packed: int) -> frozenset[int]:
        """What region k takes, without unpacking this."""
        unpacking = {way for way in part if packed in self.makers[way].reads}
        again = {self.value_of[way] for way in unpacking} & self.regions[k].again
        return (part - unpacking) | again

    def state(self, parts: Parts) -> State:
        held, seconds = self.bytes_at(parts)
        at = int(np.argmax(held)) if len(held) else 0
        return State(parts, int(held[at]) if len(held) else 0, at, seconds)

    def all(self) -> Parts:
        """Every value remade, by the first of its ways."""
        return self.within(tuple(frozenset(min(ways) for ways in region.values.values()) for region in self.regions))

    def none(self) -> Parts:
        return tuple(frozenset() for _ in self.regions)

    def remakes(self, parts: Parts) -> tuple[Remake, ...]:
        """The offers that really serve a read, in the problem's order."""
        used: Iterable[int] = (
            self.regions[k].offers[way] for k, part in enumerate(parts) for way in self.work(k, part).used
        )
        return tuple(self.problem.remakes[offer] for offer in sorted(used))
