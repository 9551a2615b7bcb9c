"""From the step as it is down to a budget, rung by rung, with gaps opened and closed (`memopt.solvers.gaps`).

A rung is a target in bytes. On each the cheapest is taken of three: gaps opened in the plan of the rung above, the
model's answer with gaps closed, a plan of the chain with gaps closed. The first rungs stand far apart; from the last
one above the budget narrower ones lead on. No rung's place depends on the budget, which only says where to stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memopt.edit import Remake
from memopt.plans import Plan
from memopt.solvers.engine import Engine
from memopt.solvers.gaps import Gaps, Played
from memopt.solvers.space import Space

STEPS = (0.8, 0.96, 0.99, 0.998, 0.9995)  # of the peak of one rung's plan to the target of the next
LARGE = 5_000  # steps above which simulations are too dear
NEAR = 1.03  # times the target: plans above it that may be brought within it
HOPE = 1.2  # a plan so much dearer than another is not undercut by closing gaps in it


class Ladder:
    """One way down for one problem. starts: plans that may join it on the rungs beside them."""

    def __init__(self, space: Space, starts: Iterable[Plan]) -> None:
        self.space, self.gaps, self.engine = space, Gaps(space.problem), Engine(space)
        self.engine.trials = 0  # gaps close what exchanges would gain
        self.starts = sorted(starts, key=lambda plan: (plan.seconds, plan.peak))
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
        for seconds, chosen in self.others(target, step):
            if best is None or seconds < best.seconds * HOPE:
                found = self.within(chosen, target)
                if found is not None and (best is None or (found.seconds, found.peak) < (best.seconds, best.peak)):
                    best = found
        return best

    def others(self, target: int, step: float) -> Iterator[tuple[float, tuple[Remake, ...]]]:
        """What was found otherwise at about the target: the model's state, and the starts beside this rung."""
        reached = self.engine.reach(target, self.state)
        if reached is not None:
            self.state = reached
            yield reached.seconds, self.space.remakes(reached.parts)
        yield from ((plan.seconds, plan.chosen) for plan in self.starts if step * target < plan.peak <= NEAR * target)

    def within(self, chosen: tuple[Remake, ...], target: int) -> Played | None:
        """These remakes with gaps closed where there is room, or opened where there is not."""
        played = self.gaps.play(chosen)
        return self.gaps.filled(played, target) if played.peak <= target else self.gaps.thinned(played, target)
