"""From the step as it is down to a budget, rung by rung, with gaps opened and closed (`memopt.solvers.gaps`).

A rung is a target in bytes. On each the cheapest is taken of three: gaps opened in the plan of the rung above, the
model's answer with gaps closed, plans of the chain likewise. The first rungs stand far apart; from the last
one above the budget narrower ones lead on. No rung's place depends on the budget, which only says where to stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from memopt.edit import Remake
from memopt.plans import Plan
from memopt.solvers.engine import Engine
from memopt.solvers.gaps import Gaps, Played
from memopt.solvers.space import Space

STEPS = (0.8, 0.96, 0.99, 0.998, 0.9995)  # of the peak of one rung's plan to the target of the next
LARGE = 5_000  # steps above which simulations are too dear
NEAR = 1.03  # times the target: plans above it that may be brought within it
CHEAPEST = 4  # starts tried on a rung, besides the lowest
HOPE = 1.2  # a plan so much dearer than another is not undercut by closing gaps in it


class Ladder:
    """One way down for one problem. starts: plans that may join it on the rungs beside them."""

    def __init__(self, space: Space, starts: Iterable[Plan]) -> None:
        self.space, self.gaps, self.engine = space, Gaps(space.problem), Engine(space)
        self.engine.trials = 0  # gaps close what exchanges would gain
        self.starts = [Start(self.gaps, plan.chosen, plan.peak, plan.seconds) for plan in starts]
        self.starts.sort(key=lambda start: (start.seconds, start.peak))
        self.state = space.state(space.none())

    def down(self, budget: int) -> Iterator[Plan]:
        """Plans above the budget and the first within it, once for each width of step."""
        above = self.gaps.play(())
        for step in STEPS:
            found: Played | None = above
            while found is not None and found.peak > budget:
                above, found = found, self.rung(found, step)
                yield from () if found is None else (found.plan(budget),)

    def rung(self, above: Played, step: float) -> Played | None:
        """The cheapest plan within this share of the peak above, None if there is none."""
        target = int(above.peak * step)
        best = self.gaps.thinned(above, target)
        for start in self.others(target, step):
            if best is None or start.seconds < best.seconds * HOPE:
                found = self.within(start.played, target)
                if found is not None and (best is None or (found.seconds, found.peak) < (best.seconds, best.peak)):
                    best = found
        return best

    def others(self, target: int, step: float) -> Iterator[Start]:
        """What was found otherwise at about the target: the model's state, and of the starts beside this rung the
        cheapest and the lowest."""
        reached = self.engine.reach(target, self.state)
        if reached is not None:
            self.state = reached
            yield Start(self.gaps, self.space.remakes(reached.parts), reached.peak, reached.seconds)
        beside = [start for start in self.starts if step * target < start.peak <= NEAR * target]
        yield from beside[:CHEAPEST]
        yield from sorted(beside[CHEAPEST:], key=lambda start: start.peak)[:1]

    def within(self, played: Played, target: int) -> Played | None:
        """These remakes with gaps closed where there is room, or opened where there is not."""
        return self.gaps.filled(played, target) if played.peak <= target else self.gaps.thinned(played, target)


@dataclass
class Start:
    """Remakes that may join. peak: bytes; seconds: added. Played once, however many rungs they stand beside."""

    gaps: Gaps
    chosen: tuple[Remake, ...]
    peak: int
    seconds: float

    @cached_property
    def played(self) -> Played:
        """What they make of the step."""
        return self.gaps.play(self.chosen)
