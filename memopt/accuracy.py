"""The bound on the gradient's error, kept: what is known of a model's values, and plans held to what a batch shows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf

from memopt.capture import Survey
from memopt.errors import PlanFileError
from memopt.noise import LOSSY, Noise
from memopt.passes import TRADES
from memopt.planned import Planned
from memopt.probe import Probe, measured_noise, probe_of
from memopt.request import Request
from memopt.smaller import Call

log = logging.getLogger("memopt")

CORRECTIONS = 2  # plans made anew of larger estimates, where one was measured to be too far off


@dataclass
class Accuracy:
    """Of one model. noise: grows with each batch of a new shape, by classes of values not seen before; used: the one of
    the latest plan, its estimates raised where a batch asked for that."""

    noise: Noise = field(default_factory=Noise)
    used: Noise = field(default_factory=Noise)

    def probe(self, found: Survey, call: Call | None, request: Request) -> Probe | None:
        """The step on a real batch, where lossy levers are allowed and it can be run; measures what is new in it."""
        trades = [trade() for trade in TRADES if trade.name in LOSSY and trade.name not in request.off]
        try:
            probe = probe_of(found, call) if trades else None
            new = measured_noise(probe, trades, self.noise.measured) if probe is not None else {}
        except (RuntimeError, MemoryError) as error:  # no room after all, or an operation that runs in no other way
            log.warning("memopt: what lossy levers do to the gradient was not measured: %s", error)
            return None
        self.noise = replace(self.noise, measured={**self.noise.measured, **new})
        return probe

    def held(self, plan: Callable[[Noise], Planned], probe: Probe | None, limit: float) -> Planned:
        """The plan, or one made of larger estimates where the batch shows that it is further off than the limit, or in
        the end one without lossy levers.

        plan: makes one, with this noise. The measured error is in the result. Raises PlanFileError where a saved plan
        is further off than the limit."""
        self.used = self.noise
        for turn in range(CORRECTIONS + 1):
            planned = plan(self.used)
            if turn and planned.result.infeasible:
                break
            if probe is None or not planned.result.plan.lossy or planned.result.infeasible:
                return planned
            error = probe.error(planned.remakes(0), planned.whole)
            if error <= limit:
                return replace(planned, result=replace(planned.result, measured_grad_error=error))
            if planned.result.reused:
                raise PlanFileError(
                    f"the saved plan puts the gradient of this batch off by {error:.2g} of its length, more than "
                    f"max_grad_error={limit:.2g} allows; raise it, or plan anew"
                )
            self.used = replace(self.used, scale=self.used.scale * (error / planned.result.plan.grad_error) ** 2)
        return plan(replace(self.used, scale=inf))
