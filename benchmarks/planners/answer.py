"""What a planner answers, and what all planners share: keep everything, and asking again when an estimate missed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.planners.export import Work
from benchmarks.planners.schedule import Schedule
from benchmarks.planners.simulator import simulate

ASKS = 6  # times a planner that plans on estimates is asked
MORE = 0.02  # of the budget, by which the next question is larger where the answer left room or there was none


@dataclass(frozen=True)
class Answer:
    """schedule: None if the planner found none. bound: no plan of the planner's own family adds fewer seconds, by its
    own account. floor: least peak it knows to be reachable, bytes. note: a sentence for the table."""

    schedule: Schedule | None
    bound: float | None = None
    floor: int | None = None
    note: str = ""


def settled(work: Work, budget: int, ask: Callable[[float], Schedule | None], asks: int = ASKS) -> Schedule | None:
    """The planner's fastest answer that the simulator agrees holds the budget.

    A planner that reckons in blocks or slots is off by what it does not see, either way. It is asked again with the
    difference added to its budget, and for a little more where it sees no plan, so that nobody loses by the step graph
    being finer than its own model. Where nothing it says holds, the lowest is returned.
    """
    target, found = float(budget), list[tuple[bool, float, Schedule]]()
    fitted, failed = 0.0, math.inf
    for _ in range(asks):
        schedule = ask(target)
        if schedule is None:
            if found:
                break
            target += MORE * budget
            continue
        score = simulate(work.graph, work.seconds, schedule, work.block)
        over = score.peak > budget
        found.append((over, score.peak if over else score.seconds, schedule))
        fitted, failed = (fitted, min(failed, target)) if over else (max(fitted, target), failed)
        step = budget - score.peak if over else max(budget - score.peak, MORE * budget)
        target = (fitted + failed) / 2 if fitted > 0 and failed < math.inf else target + step
    return min(found, key=lambda f: f[:2])[2] if found else None
