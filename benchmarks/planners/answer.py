"""What a planner answers, and what all planners share: keep everything, and asking again when an estimate missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.planners.export import Work
from benchmarks.planners.schedule import Schedule
from benchmarks.planners.simulator import simulate

ASKS = 6  # times a planner whose estimate the simulator refutes is asked again


@dataclass(frozen=True)
class Answer:
    """schedule: None if the planner found none. bound: no plan of the planner's own family adds fewer seconds, by its
    own account. floor: least peak it knows to be reachable, bytes. note: a sentence for the table."""

    schedule: Schedule | None
    bound: float | None = None
    floor: int | None = None
    note: str = ""


def settled(work: Work, budget: int, ask: Callable[[float], Schedule | None]) -> Schedule | None:
    """The planner's answer once the simulator agrees that it holds the budget.

    A planner that reckons in blocks or slots may be off by what it does not see; it is asked again with that taken
    off its budget, so that nobody loses by the step graph being finer than its own model. What never fits is returned
    as it came out at last.
    """
    target, last = float(budget), None
    for _ in range(ASKS):
        found = ask(target)
        if found is None:
            break
        last, over = found, simulate(work.graph, work.seconds, found, work.block).peak - budget
        if over <= 0:
            break
        target -= over
    return last
