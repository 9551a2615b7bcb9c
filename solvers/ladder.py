"""From the step as it is down to a budget, rung by rung, with gaps opened and closed (`memopt.solvers.gaps`).

A rung is a target in bytes. On each the cheapest is taken of three: gaps opened in the plan of the rung above, the
model's answer with gaps closed, a plan of the chain with gaps closed. The first rungs stand far apart; from the last
one above the budget narrower ones lead on. No rung's place depends on the budget, which only says where to stop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from memopt.edit import Remake
from memopt.plans import Plan
from memopt.solvers.engine import Engine
from memopt.solvers.gaps import Gaps, Played
from memopt.solvers.space import Space

STEPS = (0.8, 0.96, 0.99)  # of the peak of one rung's plan to the target of the next
LARGE = 5_000  # steps above which simulations are too dear
HOPE = 1.2  # a plan so much dearer than another is not undercut by closing gaps in it


class Ladder:
    """One way down for one problem. starts: plans that may join it, the cheapest of those within a rung at a time."""

    def __init__(self, space: Space, starts: Iterable[Plan]) -> None:
        self.space, self.gaps, self.engine = space, Gaps(space.problem), Engine(space)
        self.engine.trials = 0  # gaps close what exchanges would gain
        self.starts = undominated(starts)
        self.state = space.state(space.none())

    def down(self, budget: int) -> Iterator[Plan]:
        """Plans above the budget and the first within it, once for each width of step."""
        above = self.gaps.play(())
        for step in STEPS:
            found: Played | None = above
            while found is not None and found.peak > budget:
                above, found = found, self.rung(found, int(found.peak * step))
                yield from () if found is None else (found.plan(budget),)

    def rung(self, above: Played, target: int) -> Played | None:
        """The cheapest plan within the target, None if there is none."""
        best = self.gaps.thinned(above, target)
        for chosen in self.others(target, best):
            found = self.gaps.filled(self.gaps.play(chosen), target)
            if found.peak <= target and (best is None or (found.seconds, found.peak) < (best.seconds, best.peak)):
                best = found
        return best

    def others(self, target: int, best: Played | None) -> Iterator[tuple[Remake, ...]]:
        """Remakes found otherwise, which may be cheaper with gaps closed; a start is tried on one rung only."""
        most = best.seconds * HOPE if best is not None else math.inf
        reached = self.engine.reach(target, self.state)
        if reached is not None:
            self.state = reached
            if reached.peak <= target and reached.seconds < most:
                yield self.space.remakes(reached.parts)
        start = next((plan for plan in reversed(self.starts) if plan.peak <= target), None)
        if start is not None:
            self.starts.remove(start)
            yield start.chosen


def undominated(plans: Iterable[Plan]) -> list[Plan]:
    """Those that no other undercuts in bytes and in seconds, by bytes."""
    kept = list[Plan]()
    for plan in sorted(plans, key=lambda p: (p.peak, p.seconds)):
        if not kept or plan.seconds < kept[-1].seconds:
            kept.append(plan)
    return kept
