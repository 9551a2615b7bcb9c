"""A plan with frozen weights elsewhere, or by consent weights in fewer bits, where the model as it is has none."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, islice
from typing import Any

from torch import Tensor, nn

from memopt.edit import HOST
from memopt.errors import BudgetError, PlanFileError
from memopt.planned import Planned
from memopt.planning import Planner
from memopt.report import Lever, PlanResult
from memopt.request import Request
from memopt.shapes import input_key
from memopt.smaller import Call
from memopt.tokens import elsewhere
from memopt.ways import bytes_here, bytes_there, how, operation, storable, store, takes, trained, twin_of
from memopt.weights import ELSEWHERE, TRAINED, WEIGHTS, PackedWeights, exact

Way = tuple[str, str]  # lever, codec
ROOM = 1.05  # times what a plan exceeds the budget by, that weights are to save


@dataclass
class LighterPlanner(Planner):
    """Plans as `Planner` does, then with weights of the model packed, of the ways allowed the least lossy first.

    Once such a plan is taken, `settle` packs the model: in place where it is to run, else (`measure` False) a copy.
    stored: what is packed, by lever; pending: what the latest plan is to pack besides, and the planner of it.
    """

    stored: dict[str, PackedWeights] = field(default_factory=dict)
    pending: tuple[str, PackedWeights, Planner] | None = None
    taken: dict[tuple[str, str], bool] = field(default_factory=dict)  # codec, weight -> whether it packs it

    def chosen(self, key: Any, call: Call) -> Planned:
        """The plan. Raises BudgetError with the floor of the last way tried, or of the model as it is where that is
        lower: of small matrices reading may take more than packing saves."""
        self.pending, ways = None, self.ways()
        if not ways:
            return self.with_stored(super().chosen(key, call))
        plain, advise, saved = self.request, self.advise, self.plan_file is not None
        self.request, self.advise = replace(plain, weights=()), False
        try:
            if not saved:
                return self.with_stored(super().chosen(key, call))
        except BudgetError:
            pass  # with the weights as they are; what is refused in the end is the last of the ways
        finally:
            self.request, self.advise = plain, advise
        return self.packed(ways, key, call)

    def ways(self) -> tuple[Way, ...]:
        """Ways to pack weights that are left to try: none where there is nothing to pack, a saved plan's where there is
        one. Raises PlanFileError where that is not allowed here."""
        saved = () if self.plan_file is None else self.plan_file.levers
        used = tuple(each["lever"] for each in saved if each["lever"] in (*WEIGHTS, *TRAINED, *ELSEWHERE))
        used, known = tuple(name for name in used if name not in self.stored), dict(self.request.weights)
        if refused := [name for name in used if name not in known]:
            kind = "trained" if refused[0] in TRAINED else "frozen"
            raise PlanFileError(
                f"the plan packs {kind} weights ({refused[0]}), which this call does not allow; allow it as when the "
                "plan was made, or plan anew"
            )
        ways = self.request.weights if self.plan_file is None else tuple((name, known[name]) for name in used)
        return tuple(way for way in ways if self.fitting(way))

    def packed(self, ways: Sequence[Way], key: Any, call: Call) -> Planned:
        """The plan in the first of these ways that has one, with no more weights packed than must be, unless it takes
        another lowering or streams to pack no more; where none takes a weight, that of the model as it is."""
        ways = [way for way in ways if self.accepted(way)]
        if not ways:
            return self.with_stored(super().chosen(key, call))
        before, tries = self.refused, [(way, names) for way in ways for names in self.portions(way)]
        tries = tries or [(ways[-1], tuple(self.accepted(ways[-1])))]
        for at, (way, names) in enumerate(tries):
            twin, done = twin_of(self.model, self.request, way[1], names)
            given = {each.name: getattr(self, each.name) for each in fields(Planner)}
            request = lessened(self.request, self.model, done)
            other = Planner(**{**given, "model": twin, "request": request, "surveys": {}, "refused": None})
            other.advise = self.advise and at == len(tries) - 1
            other.patient = at == len(tries) - 1 or tries[at + 1][0] != way  # else more weights of this way are next
            try:
                planned = other.chosen(input_key(twin, *call), call)
            except BudgetError:
                self.refused = other.refused
                if at < len(tries) - 1:
                    continue
                lowest = other.refused
                if before is not None and lowest is not None and before.plan.peak < lowest.plan.peak:
                    return self.with_stored(super().chosen(key, call))  # refused as well, with the lower floor
                raise
            self.pending = way[0], done, other
            return self.with_stored(planned, before)
        raise AssertionError("there is always one to try")

    def with_stored(self, planned: Planned, before: PlanResult | None = None) -> Planned:
        """The plan with the levers of what is packed, by it and before it. before: as in `told`."""
        result = planned.result
        for way, done in self.every().items():
            result = told(result, way, done, before)
        return replace(planned, result=result)

    def every(self) -> dict[str, PackedWeights]:
        """What is packed, and what the latest plan is to pack besides, by lever."""
        if self.pending is None:
            return self.stored
        way, new, _ = self.pending
        old = self.stored.get(way, PackedWeights(new.codec, (), 0, 0))
        both = PackedWeights(new.codec, (*old.names, *new.names), old.before + new.before, old.after + new.after)
        return {**self.stored, way: both}

    def fitting(self, way: Way) -> dict[str, Tensor]:
        """The weights that can be packed so, the first ones: where they lie elsewhere, as many as there is room for."""
        weights = storable(self.model, self.request, way[1])
        if not elsewhere(way[1]):
            return weights
        room = [*accumulate(bytes_there(way[1], weight) for weight in weights.values())]
        return dict(islice(weights.items(), bisect_right(room, limit_of(self.request, way[1]))))

    def accepted(self, way: Way) -> dict[str, Tensor]:
        """Of those the ones whose values the codec takes: looked at once, and only where weights are to be packed."""
        weights = self.fitting(way)
        for name, weight in weights.items():
            if (way[1], name) not in self.taken:
                self.taken[way[1], name] = takes(way[1], weight, self.request)
        return {name: weight for name, weight in weights.items() if self.taken[way[1], name]}

    def portions(self, way: Way) -> tuple[Sequence[str], ...]:
        """Which weights to pack, the fewest first: as many as a saved plan; else as many of the first ones as save what
        the least plan exceeds the budget by, twice as many, and all. Empty where all would not."""
        weights, codec = self.accepted(way), way[1]
        names = tuple(weights)
        if self.plan_file is not None:
            count = next(each["count"] for each in self.plan_file.levers if each["lever"] == way[0])
            return (names[:count],)
        assert self.refused is not None
        saved = [*accumulate(w.nbytes - bytes_here(codec, w, self.request) for w in weights.values())]
        over = self.refused.plan.peak - self.refused.budget
        if not saved or saved[-1] < over:
            return ()
        in_use = max(w.nbytes for w in weights.values())
        some = bisect_left(saved, ROOM * over + in_use) + 1
        return (*(names[:count] for count in (some, 2 * some) if count < len(names)), names)

    def settle(self) -> None:
        """The latest plan is the one to run: pack what it does. An optimizer that holds frozen weights would keep their
        bytes: it gets empty ones in their place, which never have a gradient."""
        if self.pending is None:
            return
        (_, done, other), every = self.pending, self.every()
        if self.measure:
            weights = {id(self.model.get_parameter(name)) for name in done.names}
            store(self.model, self.request, done)
            optimizer = None if trained(done.codec) else self.request.optimizer  # what is trained it is to hold
            for group in optimizer.param_groups if optimizer is not None else ():
                group["params"] = [emptied(p) if id(p) in weights else p for p in group["params"]]
        else:
            self.model = other.model
        self.surveys, self.request = other.surveys, replace(other.request, weights=self.request.weights)
        self.stored, self.pending = every, None


def emptied(weight: Tensor) -> nn.Parameter:
    """A frozen parameter of no elements."""
    return nn.Parameter(weight.detach().new_empty(0), requires_grad=False)


def limit_of(request: Request, codec: str) -> int:
    """Bytes that may lie in this pool."""
    return (request.host if codec.startswith(HOST) else request.disk)[0]


def lessened(request: Request, model: nn.Module, done: PackedWeights) -> Request:
    """The request when these weights of the model are packed: what they take elsewhere no activation can take."""
    request = replace(request, weights=())
    if not elsewhere(done.codec):
        return request
    there = sum(bytes_there(done.codec, model.get_parameter(name)) for name in done.names)
    left = limit_of(request, done.codec) - there, done.codec
    return replace(request, host=left) if done.codec.startswith(HOST) else replace(request, disk=left)


def told(result: PlanResult, way: str, done: PackedWeights, before: PlanResult | None) -> PlanResult:
    """The result with the lever, and compared with the step of the model as it was. before: its refusal."""
    reads = operation(done.codec)
    seconds = sum(result.seconds_of(step) for step in result.before.steps if step.op == reads)
    kept = "exact" if exact(done.codec) else "lossy"
    lever = Lever(way, kept, done.before - done.after, seconds, len(done.names))
    note = f"{len(done.names)} {how(way, done.codec)}"
    lighter = replace(result, rewrites=(*result.rewrites, lever), notes=(*result.notes, note))
    if before is None:
        return lighter
    seconds_of = before.seconds if before.plain is None else before.plain_seconds
    return replace(lighter, plain=before.baseline, plain_seconds=seconds_of)
