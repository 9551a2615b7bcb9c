"""The planned step at other sizes: photographs for the formula, and the search for the largest size that fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from memopt.capture import Survey
from memopt.carry import carried
from memopt.edit import Remake, edit
from memopt.errors import CaptureError
from memopt.formula import BOTH_OR_ONE, Axes, Formula, Point, find_formula
from memopt.fusion import fused
from memopt.graph import StepGraph
from memopt.optim.photograph import WHOLE, OptimizerPhase
from memopt.optim.portions import Update
from memopt.passes import TRADES
from memopt.pipeline import make_plan, optimizer_phase, step_graph
from memopt.planned import Planned
from memopt.seams import parts_of
from memopt.session import Session

log = logging.getLogger("memopt")

AHEAD = 4  # sizes further than one that fits, where nothing is known not to; as many times further each time


def surveyed(session: Session, inputs: Mapping[str, Any], lowering: str = "", chunks: int = 0) -> Survey:
    """The session's step for these keyword inputs, captured but not planned, nor as it was written.

    Raises CaptureError.
    """
    return session.capture(((), dict(inputs)), lowering=lowering, beside=False, chunks=chunks)


def floor_plan(session: Session, found: Survey) -> Planned:
    """The plan that needs the least bytes, whatever its seconds: what a budget of one byte is answered with."""
    return make_plan(found, replace(session.request, budget=1), session.costs(found), 0.0, session.progress)


@dataclass
class Elsewhere:
    """The session's step at other sizes. inputs: (batch, sequence) -> keyword inputs, fake, in the model's mode.

    first: the survey the plan was made of; the optimizer's phase does not depend on sizes and is taken from it.
    lowering, update: of that plan: what runs it, and how it has the optimizer step. How it streams is that of `first`.
    """

    session: Session
    inputs: Callable[[int, int], Mapping[str, Any]]
    first: Survey
    lowering: str
    update: Update = WHOLE

    @cached_property
    def phase(self) -> OptimizerPhase:
        return optimizer_phase(self.first, self.session.request, self.update)

    def photograph(self, batch: int, seq: int) -> StepGraph | None:
        """The unplanned step at these sizes; None, logged, if the model cannot be captured there."""
        session = self.session
        session.progress("formula", None)
        try:
            found = surveyed(session, self.inputs(batch, seq), self.lowering, self.first.chunks)
        except (CaptureError, ValueError) as stopped:
            log.info("no photograph at batch %d, sequence %d: %s", batch, seq, stopped)
            return None
        whole = step_graph(found, parts_of(found), session.request, self.phase, session.costs(found))
        return fused(whole).graph if self.lowering == "inductor" else whole

    def formula(self, planned: Planned, base: Point, vary: Axes = BOTH_OR_ONE) -> Formula | None:
        """The peak of this plan's decisions, feasible or not, in batch and sequence. base: where it was planned.

        A plan for a batch of 1, whose program is special, is carried over to a batch of 2 where it varies.
        """
        if planned.update != self.update:
            return replace(self, update=planned.update).formula(planned, base, vary)
        graph, chosen, block = planned.problem.graph, planned.result.plan.chosen, planned.result.block
        if not base[0]:
            return None  # the workload fixed its inputs
        if base[0] == 1:
            if 0 in vary[0] and (found := self.carried(planned, (2, base[1]), vary)):
                return found
            vary = tuple(axes for axes in vary if 0 not in axes)
        return find_formula(graph, edit(graph, chosen), block, base, self.photograph, vary) if vary else None

    def carried(self, planned: Planned, base: Point, vary: Axes) -> Formula | None:
        """The formula of the same decisions, planned elsewhere than at `base`."""
        there = self.photograph(*base)
        if there is None:
            return None
        chosen = carried(
            planned.problem.graph, there, planned.result.plan.chosen, planned.problem.remakes, self.offers(there)
        )
        if chosen is None:
            return None
        return find_formula(there, edit(there, chosen), planned.result.block, base, self.photograph, vary)

    def offers(self, graph: StepGraph) -> tuple[Remake, ...]:
        """What the trades propose for another photograph; only the chosen count, so they go without prices."""
        offered = (trade() for trade in TRADES if trade.name not in self.session.request.off)
        return tuple(remake for trade in offered for remake in trade.propose(graph, {}))


def largest(over: Callable[[int], int | None], guess: int, spare: int | None = None) -> int:
    """The largest size that fits, 0 if there is none. Assumes that what fits also fits smaller.

    over: by how many bytes a size exceeds the budget; 0 where it fits, None where it does not and no bytes are known.
    spare: bytes of the budget that a size of 0 would leave.
    Asks at the guess, then one away from it, then ever further, until something does not fit. In between it asks
    where the line through the two least sizes known not to fit, or through one and `spare`, meets the budget, and where
    that narrows little, in the middle.
    """
    low, high = 0, 0  # 0: not known yet
    refused: dict[int, int] = {}

    def ask(size: int) -> None:
        nonlocal low, high
        found = over(size)
        low, high = (size, high) if found == 0 else (low, size)
        if found:
            refused[size] = found

    ask(max(1, guess))
    if low or high > 1:
        ask(low + 1 if low else high - 1)
    step = AHEAD
    while not high:
        ask(low + step)
        step *= AHEAD
    straight = True
    while high - low > 1:
        before, crossing = high - low, _crossing(refused, spare) if straight else None
        ask((low + high) // 2 if crossing is None else min(max(crossing, low + 1), high - 1))
        straight = not straight or low == crossing or 2 * (high - low) <= before
    return low


def _crossing(refused: Mapping[int, int], spare: int | None) -> int | None:
    """The last size within the budget by the line through the two least that are not, or the least and a size of 0;
    None where there is no line."""
    known = sorted(refused.items())[:2] + ([] if spare is None else [(0, -spare)])
    if len(known) < 2:
        return None
    (one, above), (other, more) = sorted(known[:2], reverse=True)
    return one + -above * (one - other) // (above - more) if more < above else None
