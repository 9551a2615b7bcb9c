"""The bound on the gradient's error, kept: what is known of a model's values, and plans held to what a batch shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf

from memopt.capture import Survey
from memopt.noise import LOSSY, Noise
from memopt.passes import TRADES
from memopt.pipeline import Planned, Request
from memopt.probe import Probe, measured_noise, probe_of
from memopt.smaller import Call

CORRECTIONS = 2  # plans made anew because one was measured to be too far off; after them no lossy lever is used


@dataclass
class Accuracy:
    """Of one model. noise: grows with each batch of a new shape, by classes of values not seen before."""

    noise: Noise = field(default_factory=Noise)

    def probe(self, found: Survey, call: Call | None, request: Request) -> Probe | None:
        """The step on a real batch, where lossy levers are allowed and it can be run; measures what is new in it."""
        trades = [trade() for trade in TRADES if trade.name in LOSSY and trade.name not in request.off]
        probe = probe_of(found, call) if trades else None
        if probe is not None:
            new = measured_noise(probe, trades, self.noise.measured)
            self.noise = replace(self.noise, measured={**self.noise.measured, **new})
        return probe

    def held(self, plan: Callable[[Noise], Planned], probe: Probe | None, limit: float) -> Planned:
        """The plan, or one made of larger estimates where the batch shows that it is further off than the limit.

        plan: makes one, with this noise. The measured error is in the result."""
        noise = self.noise
        for turn in range(CORRECTIONS + 1):
            planned = plan(noise)
            predicted = planned.result.plan.grad_error
            if probe is None or not predicted or planned.result.infeasible:
                return planned
            error = probe.error(planned.remakes(0), planned.whole)
            if error <= limit or planned.result.reused:
                return replace(planned, result=replace(planned.result, measured_grad_error=error))
            noise = replace(noise, scale=noise.scale * (error / predicted) ** 2 if turn + 1 < CORRECTIONS else inf)
        return planned
