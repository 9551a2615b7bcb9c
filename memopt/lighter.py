"""A plan with frozen weights in fewer bits, by consent, where the model as it is has none within the budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch

from memopt.errors import BudgetError, PlanFileError
from memopt.kernels.codec import PACKED_BYTES, relative_error
from memopt.pipeline import Planned
from memopt.planning import Planner
from memopt.report import Lever, PlanResult
from memopt.shapes import input_key
from memopt.smaller import Call
from memopt.weights import WEIGHTS, PackedWeights, pack_weights, packable, packed_twin

ROOM = 1.05  # times what a plan exceeds the budget by, that weights are to save


@dataclass
class LighterPlanner(Planner):
    """Plans as `Planner` does, then with the model's frozen weights packed, of the ways allowed the least lossy first.

    Once such a plan is taken the model is packed: in place where it is to run, else (`measure` False) a copy of it.
    """

    def chosen(self, key: Any, call: Call) -> Planned:
        """The plan. Raises BudgetError with the floor of the last way tried."""
        ways = self.ways()
        if not ways:
            return super().chosen(key, call)
        plain, advise, saved = self.request, self.advise, self.plan_file is not None
        self.request, self.advise = replace(plain, weights=()), False
        try:
            if not saved:
                return super().chosen(key, call)
        except BudgetError:
            pass  # with the weights as they are; what is refused in the end is the last of the ways
        finally:
            self.request, self.advise = plain, advise
        return self.packed(ways, call)

    def ways(self) -> tuple[str, ...]:
        """Ways to pack weights that are left to try: none where there is nothing to pack, a saved plan's where there is
        one. Raises PlanFileError where that is not allowed here."""
        saved = () if self.plan_file is None else self.plan_file.levers
        used = tuple(each["lever"] for each in saved if each["lever"] in WEIGHTS)
        if refused := [way for way in used if way not in self.request.weights]:
            raise PlanFileError(
                f"the plan packs frozen weights ({refused[0]}), which this call does not allow; allow it as when the "
                "plan was made, or plan anew"
            )
        ways = self.request.weights if self.plan_file is None else used
        return ways if ways and packable(self.model) else ()

    def packed(self, ways: Sequence[str], call: Call) -> Planned:
        """The plan in the first of these ways that has one, with no more weights packed than must be."""
        before, tries = self.refused, [(way, names) for way in ways for names in self.portions(way)]
        tries = tries or [(ways[-1], None)]
        for at, (way, names) in enumerate(tries):
            twin, done = packed_twin(self.model, WEIGHTS[way], names)
            given = {each.name: getattr(self, each.name) for each in fields(Planner)}
            other = Planner(**{**given, "model": twin, "surveys": {}, "refused": None})
            other.advise = self.advise and at == len(tries) - 1
            try:
                planned = other.chosen(input_key(twin, *call), call)
            except BudgetError:
                self.refused = other.refused
                if at == len(tries) - 1:
                    raise
                continue
            self.surveys = other.surveys
            self.settle(twin, done)
            return replace(planned, result=told(planned.result, way, done, before))
        raise AssertionError("there is always one to try")

    def portions(self, way: str) -> tuple[Sequence[str] | None, ...]:
        """Which weights to pack, the fewest first: as many as a saved plan; else as many of the first ones as save what
        the least plan exceeds the budget by, and all. Empty where all would not."""
        names, codec = tuple(packable(self.model)), WEIGHTS[way]
        if self.plan_file is not None:
            count = next(each["count"] for each in self.plan_file.levers if each["lever"] == way)
            return (names[:count],)
        assert self.refused is not None
        weights = [self.model.get_parameter(name) for name in names]
        saved = list(accumulate(w.nbytes - PACKED_BYTES[codec](w.shape, w.itemsize) for w in weights))
        over = self.refused.plan.peak - self.refused.budget
        if saved[-1] < over:
            return ()
        in_use = max(w.nbytes for w in weights)
        some = names[: bisect_left(saved, ROOM * over + in_use) + 1]
        return (some, names) if len(some) < len(names) else (names,)

    def settle(self, twin: torch.nn.Module, done: PackedWeights) -> None:
        """From here on the model is packed. An optimizer that holds its frozen weights would keep their bytes: they are
        left empty, and it never sees a gradient of them."""
        if not self.measure:
            self.model = twin
            return
        weights = [self.model.get_parameter(name) for name in done.names]
        pack_weights(self.model, done.codec, done.names)
        optimizer = self.request.optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
        for weight in weights:
            if id(weight) in held:
                weight.data = weight.data.new_empty(0)


def told(result: PlanResult, way: str, done: PackedWeights, before: PlanResult | None) -> PlanResult:
    """The result with the lever, and compared with the step of the model as it was. before: its refusal."""
    operation = f"memopt.unpack_{done.codec}.default"
    seconds = sum(result.seconds_of(step) for step in result.before.steps if step.op == operation)
    lever = Lever(way, "lossy", done.before - done.after, seconds, len(done.names))
    off = f"each is read {relative_error(done.codec):.1%} off"
    note = f"frozen weights are stored in {done.codec} (lossy, allowed as {way}): {off}"
    lighter = replace(result, rewrites=(*result.rewrites, lever), notes=(*result.notes, note))
    if before is None:
        return lighter
    return replace(
        lighter, plain=before.baseline, plain_seconds=before.plain_seconds if before.plain else before.seconds
    )
