"""Gaps: stretches of the step in which a value is not held, though it is read before and after; opened and closed.

The offers of `memopt.passes.recompute` hold one copy for a whole region of the backward. Here a copy, or an original,
may also be let go between any two of its reads and made again for the second (as DTR does while it runs,
arXiv:2006.09616), and two copies may become one. A move is weighed on the bytes of the step as it stands: what it frees
in the gap, what its maker needs there again, the seconds of both. Many are chosen at once, the cheapest a byte first,
and only then tallied. Nothing is proven: the plans found here are candidates, compared as they come out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from memopt.edit import Remake
from memopt.graph import StepGraph
from memopt.plans import Plan, Problem, Status
from memopt.solvers.tally import Tally
from memopt.timeline import rounded

ROUNDS = 12  # of choosing moves and simulating them, for one target
WEIGHED = 10  # gaps over a peak that are weighed before one is opened
FEWER = (None, 4, 1)  # gaps opened at once; fewer where the simulation disagrees

Bytes = NDArray[np.int64]


@dataclass(frozen=True)
class Life:
    """One stay of a value in memory. remake: index of the remake that made it, None for the original.

    uses: positions in the edited step that touch it, ascending, its making first.
    """

    value: str
    remake: int | None
    uses: tuple[int, ...]


@dataclass(frozen=True)
class Played:
    """Remakes and what `edit` makes of them. held: bytes at each edited step. place: the original step each one is, or
    is made for. lives: stays of each offered value, in order."""

    chosen: tuple[Remake, ...]
    peak: int
    seconds: float
    held: Bytes = field(repr=False)
    place: Bytes = field(repr=False)
    lives: dict[str, list[Life]] = field(repr=False)

    def excess(self, target: int) -> int:
        """Bytes above the target, summed over steps."""
        return above(self.held, target)

    def plan(self, budget: int) -> Plan:
        """As an answer to this budget; no lower bound."""
        status = Status.FEASIBLE if self.peak <= budget else Status.INFEASIBLE
        return Plan(self.chosen, self.peak, self.seconds, 0.0, status, "gaps")


@dataclass(frozen=True)
class Opening:
    """A gap that could be opened. price: seconds a byte of excess. held: bytes once it is. changed: values that other
    moves of the same round leave alone. until: life -> original position to which a copy is held for it. again: values
    made again for that moment alone."""

    price: float
    life: Life
    until: int
    since: int
    held: Bytes
    extended: tuple[Life, ...]
    again: tuple[str, ...]
    leant: tuple[str, ...]

    @property
    def changed(self) -> set[str]:
        return {self.life.value, *self.again, *(life.value for life in self.extended)}


class Gaps:
    """Moves on plans of one problem. Only values with an offer are moved, and only reads of the late phase."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.graph, self.tally = problem, problem.graph, Tally(problem)
        graph = self.graph
        self.offers: dict[str, Remake] = {}
        for remake in problem.remakes:
            if remake.repeats and remake.unpack[0].name in graph.position:
                self.offers.setdefault(remake.value, remake)
        self.size = {v: rounded(graph.storages[v].nbytes, problem.block) for v in self.offers}
        self.reads = {v: read_by(graph, remake) for v, remake in self.offers.items()}
        self.made = {v: graph.uses[v][0] for v in self.offers}
        self.price = {v: remake.seconds / max(self.size[v], 1) for v, remake in self.offers.items()}

    def play(self, chosen: tuple[Remake, ...]) -> Played:
        """What these remakes make of the step."""
        run = self.tally.run(chosen)
        lives: dict[str, list[Life]] = {v: [] for v in self.offers}
        for value, remake, uses in run.stays(self.offers):
            lives[value].append(Life(value, remake, uses))
        for stays in lives.values():
            stays.sort(key=lambda life: life.uses)
        return Played(chosen, run.peak, run.seconds, run.held, run.place, lives)

    # -- less time --------------------------------------------------------------------------------------------------

    def filled(self, played: Played, target: int) -> Played:
        """Gaps closed where the target has room for the value: fewer seconds, at most `target` bytes."""
        for _ in range(ROUNDS):
            chosen = self.closed(played, target)
            found = self.play(chosen) if chosen is not None else None
            if found is None or found.peak > target or found.seconds >= played.seconds * (1 - 1e-9):
                break
            played = found
        return played

    def closed(self, played: Played, target: int) -> tuple[Remake, ...] | None:
        """The remakes with gaps closed that fit beside each other, those that save most seconds a byte first."""
        held, chosen = played.held.copy(), dict(enumerate(played.chosen))
        pairs = [pair for stays in played.lives.values() for pair in pairwise(stays) if pair[1].remake is not None]
        pairs.sort(key=lambda pair: (-self.price[pair[0].value], pair[0].value, pair[0].uses))
        joined: dict[int, int | None] = {}  # remake taken up -> the one that serves its reads now (None: the original)
        for before, after in pairs:
            gap = held[before.uses[-1] + 1 : after.uses[0]]
            if after.remake not in chosen or (len(gap) and int(gap.max()) + self.size[before.value] > target):
                continue
            first = before.remake
            while first in joined and first is not None:
                first = joined[first]
            if first == after.remake:  # one remake, two storages: a tensor of the value made beside another step's
                continue
            gap += self.size[before.value]
            gone = chosen.pop(after.remake)
            joined[after.remake] = first
            if first is not None:
                chosen[first] = replace(chosen[first], span=(chosen[first].span[0], gone.span[1]))
        return tuple(chosen.values()) if joined else None

    # -- fewer bytes ------------------------------------------------------------------------------------------------

    def descent(self, played: Played, step: float) -> Iterator[Played]:
        """The plan and ever lower ones, each from the one before it at `step` of its peak, until none is found."""
        found: Played | None = played
        while found is not None:
            yield found
            found = self.thinned(found, int(found.peak * step))

    def thinned(self, played: Played, target: int) -> Played | None:
        """Gaps opened until the target holds, then what was opened in vain is closed; None if it cannot be met."""
        for _ in range(ROUNDS):
            found = next((f for most in FEWER if (f := self.thinner(played, target, most)) is not None), None)
            if found is None or found.peak <= target:
                return None if found is None else self.filled(found, target)
            played = found
        return None

    def thinner(self, played: Played, target: int, most: int | None) -> Played | None:
        """One round: at most so many gaps opened, simulated; None unless that leaves less above the target."""
        opened = self.openings(played, target, most)
        found = self.play(self.applied(played, opened)) if opened else None
        return found if found is not None and found.excess(target) < played.excess(target) else None

    def openings(self, played: Played, target: int, most: int | None) -> list[Opening]:
        """Gaps to open at once: each the cheapest over the highest moment that the ones before it leave."""
        held, taken, leant, found = played.held, set[str](), set[str](), list[Opening]()
        lives = [life for v, stays in played.lives.items() if self.size[v] for life in stays]
        lives.sort(key=lambda life: (self.price[life.value], life.value, life.uses))
        begins, ends = (np.array([life.uses[i] for life in lives], np.int64) for i in (0, -1))
        while (most is None or len(found) < most) and int(held.max()) > target:
            at, busy = int(held.argmax()), taken | leant
            weighed = list[Opening]()
            for life in (lives[i] for i in np.flatnonzero((begins < at) & (at < ends))):
                if at not in life.uses and life.value not in busy:
                    opening = self.weigh(played, held, target, life, at, taken)
                    weighed += [opening] if opening is not None else []
                    if len(weighed) == WEIGHED:
                        break
            if not weighed:
                break
            found.append(min(weighed, key=lambda o: (o.price, o.life.value)))
            held = found[-1].held
            taken |= found[-1].changed
            leant |= {*found[-1].leant}
        return found

    def weigh(self, played: Played, held: Bytes, target: int, life: Life, at: int, taken: set[str]) -> Opening | None:
        """The gap of this life over edited step `at`: what it frees, and what making the value again takes."""
        index = bisect_right(life.uses, at)
        last, next_ = life.uses[index - 1], life.uses[index]
        until, since = int(played.place[last]), int(played.place[next_])
        if until >= since or since < self.graph.boundary:
            return None
        after = held.copy()
        after[last + 1 : next_] -= self.size[life.value]
        needed = self.needed(played, after, target, life.value, next_, taken)
        gained = above(held, target) - above(after, target)
        if needed is None or gained <= 0 or after[at] >= held[at]:
            return None
        seconds = sum(self.offers[v].seconds for v in (life.value, *needed[1]))
        return Opening((seconds + 1e-12) / gained, life, until, since, after, *needed)

    def needed(
        self, played: Played, held: Bytes, target: int, value: str, at: int, taken: set[str]
    ) -> tuple[tuple[Life, ...], tuple[str, ...], tuple[str, ...]] | None:
        """What making the value again for edited step `at` needs that is not there: lives to extend where the target
        has room for them, else values to make again in turn. Their bytes are added to `held`. None: not to be had."""
        burst = int(np.searchsorted(played.place, played.place[at]))
        extended, again, leant = list[Life](), list[str](), list[str]()
        seen, stack = set[str](), list(self.reads[value])
        while stack:
            read = stack.pop()
            if read in seen or read not in self.offers:
                continue
            seen.add(read)
            if read in taken:
                return None
            if any(life.uses[0] <= at and life.uses[-1] >= burst for life in played.lives[read]):
                leant.append(read)
                continue
            before = [life for life in played.lives[read] if life.uses[-1] < burst]
            if not before:
                return None
            gap = held[before[-1].uses[-1] + 1 : at + 1]
            if int(gap.max()) + self.size[read] <= target:
                gap += self.size[read]
                extended.append(before[-1])
            else:
                again.append(read)
                stack.extend(self.reads[read])
        held[burst : at + 1] += self.top(value, again) - self.size[value]
        return tuple(extended), tuple(again), tuple(leant)

    def top(self, value: str, again: list[str]) -> int:
        """Most bytes while the value is made of these, each let go after its last reader."""
        order = sorted((value, *again), key=self.made.__getitem__)
        last = {read: at for at, v in enumerate(order) for read in self.reads[v]}
        alive = most = 0
        for at, v in enumerate(order):
            alive += self.size[v]
            most = max(most, alive)
            alive -= sum(self.size[u] for u in self.reads[v] if u in again and last[u] == at)
        return most

    def applied(self, played: Played, opened: list[Opening]) -> tuple[Remake, ...]:
        """The remakes with these gaps opened."""
        chosen, steps = list(played.chosen), self.graph.steps
        for gap in opened:
            since, until = steps[gap.since].name, steps[gap.until].name
            offer, index = self.offers[gap.life.value], gap.life.remake
            if index is None:
                last = steps[int(played.place[gap.life.uses[-1]])].name
                chosen.append(replace(offer, span=(since, last)))
            else:
                first, last = chosen[index].span
                chosen[index] = replace(chosen[index], span=(first, until))
                chosen.append(replace(offer, span=(since, last)))
            for life in gap.extended:
                if life.remake is not None:
                    chosen[life.remake] = replace(chosen[life.remake], span=(chosen[life.remake].span[0], since))
            chosen.extend(replace(self.offers[v], span=(since, since)) for v in gap.again)
        return tuple(dict.fromkeys(chosen))


def read_by(graph: StepGraph, remake: Remake) -> tuple[str, ...]:
    """Storages that the steps of a remake read."""
    return tuple(dict.fromkeys(graph.storage_of(name) for step in remake.unpack for name in step.reads))


def above(held: Bytes, target: int) -> int:
    """Bytes above the target, summed over steps."""
    return int(np.maximum(held - target, 0).sum())
