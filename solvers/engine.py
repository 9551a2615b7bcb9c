"""From the relaxation to plans that hold: solve, round, simulate, correct, repair, fill.

One target at a time. The model's rows leave out what only simulation sees (transients inside a burst of copies); what
a simulated plan holds above its row is taken from the row's right side, and the model is solved again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from memopt.solvers.model import Model
from memopt.solvers.space import Parts, Space, State

TRIALS = 5_000  # exchanges for one target, times offers: more where each is cheap
ROUNDS = 6  # of solve, round, simulate, correct
SMALL = 640  # offers up to which exchanges are tried
DIVES = 12  # values settled in one dive
DEEPER = 3  # times the lowest state's own peak is asked for
TRIES = 10  # moves simulated before one is taken


class Engine:
    """Finds states at or below a target. Every call depends on the calls before it, so ask in one fixed order."""

    def __init__(self, space: Space) -> None:
        self.space, self.model = space, Model(space)
        self.extra: dict[int, float] = {}
        self.order = sorted(space.makers)
        self.offers = len(space.problem.remakes)
        self.trials = max(10, min(60, TRIALS // max(self.offers, 1))) if self.offers <= SMALL else 0

    # -- one target -------------------------------------------------------------------------------------------------

    def reach(self, target: int | None, near: State | None = None) -> State | None:
        """The cheapest state found within `target` bytes, else the lowest found; target None: the lowest.

        near: a state above the target, from which dropping alone is tried besides the model's answer."""
        best: State | None = None
        self._certify()
        for _ in range(ROUNDS):
            values = self.model.solve(target)
            if values is None:
                break
            held, state = self._simulated(self.model.rounded(values))
            best = better(best, state, target)
            moved = self._correct(held, values)
            fresh = self._add_rows(held, target)
            if not fresh and (not moved or (target is not None and state.peak <= target)):
                break
        if best is None or target is None:
            return best
        starts = [best, *self._dives(target)]
        if self.offers <= SMALL:  # where one value weighs much, rounding costs most and trying costs least
            starts += [] if near is None else [near]
        filled = [self.fill(self.repair(state, target), target) for state in starts]
        return self.exchange(min(filled, key=lambda s: (max(s.peak - target, 0), s.seconds, s.peak)), target)

    def _dives(self, target: int) -> list[State]:
        """The largest value the model splits settled each way, then the next, until none is: what rounding does worst.
        The first is tried both ways, each later one as the solution leans, else the other way."""
        found, settled = [], list[list[int]]()
        for first in (0.0, 1.0):
            lean: float | None = first
            for _ in range(DIVES if self.offers <= SMALL else 2):
                values = self.model.solve(target)
                split = [] if values is None else self.model.largest_split(values)
                if values is None or not split:
                    break
                side = lean if lean is not None else float(values[split[0]] >= 0.5)
                lean = None
                self.model.settle(split, side, side)
                settled.append(split)
                if self.model.solve(target) is None:
                    self.model.settle(split, 1.0 - side, 1.0 - side)
            values = self.model.solve(target)
            if values is not None:
                found.append(self._simulated(self.model.rounded(values))[1])
            for columns in settled:
                self.model.settle(columns, 0.0, 1.0)
            settled.clear()
        return found

    def _simulated(self, parts: Parts) -> tuple[np.ndarray, State]:
        parts = self.space.within(parts)
        held, seconds = self.space.bytes_at(parts)
        at = int(np.argmax(held))
        return held, State(parts, int(held[at]), at, seconds)

    def _add_rows(self, held: np.ndarray, target: int | None) -> int:
        """A row at the highest moment of every region, and of the rest, that breaks the target (None: the peak)."""
        limit = target if target is not None else int(held.max()) - 1
        spans = [(2 * r.first, 2 * r.last + 2) for r in self.space.regions]
        tops = [a + int(np.argmax(held[a:b])) for a, b in spans]
        tops.append(int(np.argmax(held)))
        fresh = [h for h in dict.fromkeys(tops) if held[h] > limit and h not in self.model.rows]
        for half in fresh:
            self.model.add_row(half)
        return len(fresh)

    def _correct(self, held: np.ndarray, values: np.ndarray) -> bool:
        moved = False
        for half, extra in self.model.unseen(values, held):
            if extra > self.extra.get(half, 0.0) + 1.0:
                self.extra[half] = extra
                self.model.correct(half, extra)
                moved = True
        return moved

    def lowest(self) -> State:
        """The state of least peak found: everything remade, nothing remade, the model's least bytes; then repaired
        and lowered."""
        space = self.space
        found = [space.state(space.none()), space.state(space.all())]
        reached = self.reach(None)
        if reached is not None:
            found.append(reached)
        return self.lower(self.repair(min(found, key=lambda s: (s.peak, s.seconds)), 0))

    def lower(self, state: State) -> State:
        """The state, or what is found where its own peak is asked for, and repaired: cheaper, and often lower still."""
        for _ in range(DEEPER):
            found = self.reach(state.peak, state)
            found = None if found is None else self.repair(found, 0)
            if found is None or (found.peak, found.seconds) >= (state.peak, state.seconds):
                break
            state = found
        return state

    # -- moves ------------------------------------------------------------------------------------------------------

    def drop(self, parts: Parts, way: int) -> Parts:
        """Remade in this way wherever it is offered."""
        only, v = frozenset((way,)), self.space.value_of[way]
        return self.space.with_ways(parts, v, lambda k, mine: only if way in mine else parts[k] & mine)

    def keep(self, parts: Parts, v: int) -> Parts:
        """Remade nowhere."""
        return self.space.with_ways(parts, v, lambda k, mine: frozenset())

    def repair(self, state: State, target: int, most: float = math.inf) -> State:
        """Drop what lowers the peak at least seconds a byte, until it holds, nothing lowers it, or `most` seconds."""
        while state.peak > target and state.seconds < most:
            trials = (self.space.state(self.drop(state.parts, way)) for way in self.droppable_at(state))
            lower = [s for s in trials if s.peak < state.peak]
            if not lower:
                break
            state = min(lower, key=lambda s: _price(s, state, target))
        return state

    def droppable_at(self, state: State) -> list[int]:
        """Ways to let go of values whose originals are alive at the peak because they were kept, or what they were
        packed into: the cheapest a byte first."""
        space = self.space
        ends = space.ends(state.parts)
        alive = {v for v, anchor in space.anchor.items() if anchor < state.at <= ends[v] and v not in space.held}
        packed = {space.packed[v].source for v in alive & space.packed.keys()}
        taken, held = {way for part in state.parts for way in part}, alive | packed
        ways = [way for way in self.order if space.value_of[way] in held and way not in taken]
        return sorted(ways, key=lambda way: (self.seconds_a_byte(way), way))[:TRIES]

    def seconds_a_byte(self, way: int) -> float:
        """Of making a value again in this way once, a byte that is let go."""
        space, maker = self.space, self.space.makers[way]
        left = sum(space.size[u] for u in maker.reads if u in space.packed)
        packing = sum(space.packed[u].seconds for u in maker.reads if u in space.packed)
        return (maker.seconds + packing) / max(space.size[space.value_of[way]] - left, 1)

    def fill(self, state: State, target: int) -> State:
        """Keep again what saves most seconds a byte, while the target holds."""
        tried = 0
        for v in self.remade(state.parts):
            if self.space.size[v] <= target - state.peak or tried < TRIES:
                tried += 1
                trial = self.space.state(self.keep(state.parts, v))
                if trial.peak <= max(target, state.peak) and trial.seconds < state.seconds:
                    state = trial
                if tried > 4 * TRIES:
                    break
        return state

    def exchange(self, state: State, target: int) -> State:
        """Keep one dear value again and drop cheaper ones for it, while that saves seconds."""
        left = self.trials
        while left > 0:
            better_one = None
            for v in self.dearest(state.parts):
                trial = self.repair(self.space.state(self.keep(state.parts, v)), target, state.seconds)
                left -= 1
                if trial.peak <= target and trial.seconds < state.seconds * (1 - 1e-9):
                    better_one = trial
                if better_one is not None or left <= 0:
                    break
            if better_one is None:
                break
            state = self.fill(better_one, target)
        return state

    def dearest(self, parts: Parts) -> list[int]:
        """Values really copied, those with most seconds first."""
        seconds = self.spent(parts)
        return sorted(seconds, key=lambda v: (-seconds[v], v))

    def remade(self, parts: Parts) -> list[int]:
        """Values really copied somewhere, the dearest a byte first."""
        seconds = self.spent(parts)
        return sorted(seconds, key=lambda v: (-seconds[v] / max(self.space.size[v], 1), v))

    def spent(self, parts: Parts) -> dict[int, float]:
        """Value really copied somewhere -> seconds of one copy, the dearest of its ways."""
        space, seconds = self.space, dict[int, float]()
        for way in (way for k, part in enumerate(parts) for way in space.work(k, part).used):
            v = space.value_of[way]
            seconds[v] = max(seconds.get(v, 0.0), space.makers[way].seconds)
        return seconds

    def _certify(self) -> None:
        """Take every correction back: what is left of the rows holds for any choice of the offers."""
        for half in self.extra:
            self.model.correct(half, 0.0)
        self.extra.clear()

    # -- proofs -----------------------------------------------------------------------------------------------------

    def bound(self, budget: int) -> float | None:
        """Seconds no choice of the offers undercuts within `budget` bytes; None: none holds it (certified rows)."""
        self._certify()
        best = 0.0
        for _ in range(ROUNDS):
            values = self.model.solve(budget)
            if values is None:
                return None
            best = max(best, self.model.objective())
            if not self._add_rows(self._simulated(self.model.rounded(values))[0], budget):
                break
        return best


def better(best: State | None, state: State, target: int | None) -> State:
    """Within the target the cheaper, else the lower."""

    def rank(s: State) -> tuple[int, float, float]:
        over = max(0, s.peak - target) if target is not None else s.peak
        return (over, s.seconds, s.peak)

    return state if best is None or rank(state) < rank(best) else best


def _price(state: State, before: State, target: int) -> tuple[float, int]:
    gained = before.peak - max(state.peak, target)
    return (max(state.seconds - before.seconds, 0.0) + 1e-12) / gained, state.peak


def path(engine: Engine, low: State, high: State) -> Iterable[State]:
    """States on the way from `low` (fewer bytes) to `high` (fewer seconds), one value changed at a time."""
    space = engine.space
    state = low
    differing = {way for a, b in zip(low.parts, high.parts, strict=True) for way in a ^ b}
    dear = {space.value_of[way]: space.makers[way].seconds for way in engine.order if way in differing}
    for v in sorted(dear, key=lambda v: (-dear[v] / max(space.size[v], 1), v)):
        state = space.state(space.with_ways(state.parts, v, lambda k, mine: high.parts[k] & mine))
        yield state
