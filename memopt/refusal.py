"""An infeasible step answered: the floor, what sets it, and what would make it run, each with its number."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from memopt.capture import Survey
from memopt.edit import taken
from memopt.errors import BudgetError, MemoptError, WayOut
from memopt.noise import LOSSY, Noise
from memopt.optim.precision import obstacle
from memopt.passbase import Numerics
from memopt.passes import TRADES
from memopt.passes.offload import Offload, OffloadDisk, OffloadHost
from memopt.pipeline import UNMEASURED, Costs, make_plan, silent
from memopt.planned import Planned
from memopt.plans import Plan
from memopt.report import PlanResult
from memopt.request import Request
from memopt.runtime import disk, host
from memopt.smaller import Call, Tried, cut, largest_fitting, shared_size, sizes_below
from memopt.timeline import LASTING, at_peak, by_kind, lasting
from memopt.trained import hindrance
from memopt.units import DECIMAL, format_seconds, format_size

ORDER = {"exact": 0, "reordered": 1, "lossy": 2}


def infeasible(result: PlanResult) -> BudgetError:
    """The error for a plan that does not fit: what was asked, what is needed, what sets that, the ways out."""
    asked, least = format_size(result.budget), format_size(result.plan.peak)
    what = "the saved plan's decisions need" if result.reused else "the least this step can run in is"
    lines = [f"{asked} asked; {what} {least}."]
    if (binding := result.binding) is not None:
        made_of = ", ".join(f"{kind} {_short(size)}" for kind, size in binding.kinds)
        where = ", ".join(filter(None, (binding.op, f"step {binding.step}", binding.source)))
        lines += [f"  set by    {where}", f"  made of   {made_of}"]
    for at, way in enumerate(result.ways_out):
        lines.append(f"  {'ways out' if at == 0 else '':8}  {_said(way)}")
    return BudgetError(
        "\n".join(lines),
        floor_bytes=result.plan.floor,
        budget_bytes=result.budget,
        binding=result.binding,
        ways_out=result.ways_out,
    )


def _said(way: WayOut) -> str:
    over = "" if way.fits else ", still over the budget"
    added = f"+{format_seconds(way.seconds)} a step" if way.seconds else "no time added"
    return f"{way.change} ({way.numerics}, peak {_short(way.peak_bytes)}, {added}{over})"


def _short(nbytes: int) -> str:
    return format_size(nbytes).split(" (")[0]


def round_up(nbytes: int) -> str:
    """The bytes as a budget of three figures, never less: 2,714,628 is "2.72MB"."""
    power = min(len(str(nbytes)) // 3 if nbytes >= 1000 else 0, len(DECIMAL) - 1)
    power = power if nbytes >= 1000**power else power - 1
    figures = 2 - int(math.log10(nbytes / 1000**power)) if nbytes > 1 else 0
    scale = 10 ** max(figures, 0)
    return f"{math.ceil(nbytes * scale / 1000**power) / scale:g}{DECIMAL[power]}"


def round_off(error: float) -> float:
    """A relative error of two figures, never less."""
    scale = 10 ** (1 - math.floor(math.log10(error))) if error > 0 else 1.0
    return math.ceil(error * scale) / scale


EIGHT = "adamw8bit"  # the way to store moments that is tried where none was allowed
FOUR = "nf4_weights"  # the same of frozen weights
WITHOUT_STATE = tuple(kind for kind in LASTING if kind != "state")
ANY = 1 << 62  # bytes of a disk as large as one likes
MANY = 5_000  # steps above which no lossy lever that nobody named is tried, nor another lowering: minutes for 80 layers


@dataclass(frozen=True)
class Spelling:
    """How a door writes its options. batch: with the size, the one asked for, backwards an update; seq: the sizes."""

    budget: str = 'budget="{}"'
    batch: str = "{} instead of {} along dimension 0 of the inputs, accumulated over {} backwards"
    seq: str = "{} instead of {} along dimension 1 of the inputs (the sequence)"
    optimizer: str = "optimizer=torch.optim.SGD(...)"
    allow: str = 'allow=("{}",)'
    off: str = "max_grad_error={:.2g}"
    host: str = 'host_budget="{}"'
    disk: str = 'disk_budget="{}"'
    numerics: str = 'numerics="reordered", lowering="eager"'
    lowering: str = 'lowering="eager"'
    update: str = 'update="backward"'
    on: str = 'passes without "-{}"'
    anew: str = "a plan made anew, without plan_file"


COMMAND_LINE = Spelling(
    budget="--budget {}",
    batch="--batch {0} --accumulate {2}",
    seq="--seq {}",
    optimizer="--optimizer sgd",
    allow="--allow {}",
    off="--max-grad-error {:.2g}",
    host="--host-budget {}",
    disk="--disk-budget {}",
    numerics="--numerics reordered --lowering eager",
    lowering="--lowering eager",
    update="--update backward",
    on="--passes without -{}",
    anew="a plan made anew, without --plan",
)


def hopeless(result: PlanResult, left: Sequence[str] = LASTING) -> bool:
    """Whether a large step cannot fit by a change that leaves the bytes of these kinds as they are: tried, it would say
    so again, minutes later. A small one is tried whatever comes of it."""
    return len(result.before.steps) > MANY and lasting(result.before, left) > result.budget


@dataclass(frozen=True)
class Refused:
    """A refused request, planned anew under each change that may help.

    price: the costs of a survey's operations. capture: surveys a call with other inputs.
    call: the positional and keyword inputs, or None if they are not known. reordered: surveys that call as it runs with
    reordered numerics, where that runs other operations; else None. eager: surveys it in the eager lowering, where the
    other was asked for; lighter: with frozen weights in 4 bits, where there are some. noise: what is known of lossy
    levers.
    """

    result: PlanResult
    found: Survey
    request: Request
    price: Callable[[Survey], Costs]
    call: Call | None
    capture: Callable[[Call], Survey]
    reordered: Callable[[Call], Survey] | None = None
    eager: Callable[[Call], Survey] | None = None
    lighter: Callable[[Call], Survey] | None = None
    spelling: Spelling = Spelling()
    noise: Noise = UNMEASURED

    def ways_out(self) -> tuple[WayOut, ...]:
        """Each change with the peak and the seconds it leads to; what fits first, exact before lossy."""
        plan = self.result.plan
        changes = self._anew() if self.result.reused else self._changes()
        ways = [WayOut(self.spelling.budget.format(round_up(plan.peak)), plan.peak, plan.seconds)]
        ways += [way for way in changes if way.peak_bytes < plan.peak]
        return tuple(sorted(ways, key=self._rank))

    def _rank(self, way: WayOut) -> tuple[bool, bool, int, int]:
        """Within the budget, then another budget, then what is not enough; exact before lossy."""
        return not way.fits, way.peak_bytes > self.result.budget, ORDER[way.numerics], way.peak_bytes

    def _changes(self) -> Iterator[WayOut]:
        yield from self._levers()
        yield from self._further_off()
        yield from self._host()
        yield from self._disk()
        yield from self._numerics()
        yield from self._lowering()
        yield from self._in_backward()
        yield from self._fewer_bits()
        yield from self._lighter()
        yield from self._optimizers()
        yield from self._smaller()

    def _anew(self) -> Iterator[WayOut]:
        """What the levers asked for hold without the saved decisions, which would not outlive any other change."""
        plan = self._plan(self.found, self.request)
        classes = (self.result.numerics_of(remake.trade) for remake in plan.chosen)
        yield self._way(self.spelling.anew, max(classes, key=ORDER.__getitem__, default="exact"), plan)

    def _plan(self, found: Survey, request: Request) -> Plan:
        return self._planned(found, request).result.plan

    def _planned(self, found: Survey, request: Request) -> Planned:
        return make_plan(found, replace(request, quick=True), self.price(found), 0.0, silent, noise=self.noise)

    def _way(self, change: str, numerics: str, plan: Plan) -> WayOut:
        """What this change leads to: the plan's peak, if it fits, else the lowest that was found."""
        return WayOut(change, plan.peak, plan.seconds, numerics, plan.peak <= self.result.budget)

    def _levers(self) -> Iterator[WayOut]:
        """Levers that were switched off; of those that are lossy and were not named, the first, where that is soon
        planned: it offers every activation once more."""
        off = [trade for trade in TRADES if trade.name in self.request.off and not issubclass(trade, Offload)]
        lossy = [trade for trade in off if trade.numerics is Numerics.LOSSY]
        tried = lossy[:1] if len(self.result.before.steps) <= MANY else []
        for trade in off:
            if trade not in lossy or trade in tried:
                word = self.spelling.allow if trade.numerics is Numerics.LOSSY else self.spelling.on
                request = replace(self.request, off=self.request.off - {trade.name})
                yield self._way(word.format(trade.name), trade.numerics.value, self._plan(self.found, request))

    def _further_off(self) -> Iterator[WayOut]:
        """The lossy levers that are allowed, with the error of the gradient that their plan needs."""
        if set(LOSSY) - self.request.off:
            plan = self._plan(self.found, replace(self.request, max_grad_error=math.inf))
            needed = round_off(plan.grad_error)
            if needed > self.request.max_grad_error:
                yield self._way(self.spelling.off.format(needed), "lossy", plan)

    def _disk(self) -> Iterator[WayOut]:
        """A disk, as large as the plan with any disk uses of it; none where temporary files cannot be written."""
        if self.request.device.kind != "cpu" or OffloadDisk.name not in self.request.off:
            return
        if self.request.update == "backward":
            return  # they exclude each other
        try:
            codec = disk.use(tempfile.gettempdir(), ANY).codec
            disk.pool_of(codec).rates()
        except (ValueError, disk.DiskError):
            return
        yield self._elsewhere(OffloadDisk, replace(self.request, disk=(ANY, codec)), self.spelling.disk)

    def _host(self) -> Iterator[WayOut]:
        """The host's memory, as much as the plan with any takes of it."""
        wanted = self.request.device.kind == "cuda" and OffloadHost.name in self.request.off
        if wanted and not hopeless(self.result, WITHOUT_STATE):
            anything = replace(self.request, host=(ANY, host.use(ANY).codec))
            yield self._elsewhere(OffloadHost, anything, self.spelling.host)

    def _elsewhere(self, trade: type[Offload], request: Request, word: str) -> WayOut:
        """The plan with room elsewhere, and how much of it that plan uses, for the optimizer's state too."""
        planned = self._planned(self.found, replace(request, off=request.off - {trade.name}))
        plan = planned.result.plan
        used = max(1, int(taken(plan.chosen).get(trade.resource, 0)) + planned.update.there)
        return self._way(word.format(round_up(used)), trade.numerics.value, plan)

    def _numerics(self) -> Iterator[WayOut]:
        """A recurrent layer that is one operation when exact, and its cells otherwise."""
        if self.reordered is not None and self.call is not None:
            request = replace(self.request, numerics="reordered")
            yield self._way(self.spelling.numerics, "reordered", self._plan(self.reordered(self.call), request))

    def _lowering(self) -> Iterator[WayOut]:
        """The eager lowering: a compiler may store what it fuses, and the plan cannot keep it from all of that."""
        if self.eager is None or self.call is None or len(self.result.before.steps) > MANY:
            return
        try:
            found = self.eager(self.call)
        except MemoptError:
            return  # what cannot be captured so is no way out, and the refusal stands
        plan = self._plan(found, replace(self.request, lowering="eager"))
        yield self._way(self.spelling.lowering, "reordered", plan)

    def _in_backward(self) -> Iterator[WayOut]:
        """Parameters updated in the backward, where that can be: a consent, as nobody may touch gradients then."""
        request = replace(self.request, update="backward")
        why_not = hindrance(self.found, request.optimizer, request.lowering, request.accumulate)
        held = dict(self.result.binding.kinds).get("gradient") if self.result.binding else None
        may = self.request.update == "step" and not self.request.disk[0]  # memopt.api.make_request
        if may and held and not why_not and len(self.result.before.steps) <= MANY:
            yield self._way(self.spelling.update, "exact", self._plan(self.found, request))

    def _fewer_bits(self) -> Iterator[WayOut]:
        """AdamW's moments in 8 bits."""
        wanted = EIGHT not in self.request.states and not obstacle(self.request.optimizer)
        if wanted and not hopeless(self.result, WITHOUT_STATE):
            request = replace(self.request, states=(EIGHT,))
            yield self._way(self.spelling.allow.format(EIGHT), "lossy", self._plan(self.found, request))

    def _lighter(self) -> Iterator[WayOut]:
        """Frozen weights in 4 bits."""
        if self.lighter is None or self.call is None:
            return
        try:
            found = self.lighter(self.call)
        except MemoptError:
            return  # as of the eager lowering
        yield self._way(self.spelling.allow.format(FOUR), "lossy", self._plan(found, self.request))

    def _optimizers(self) -> Iterator[WayOut]:
        """One without state, if this one has some."""
        kinds = by_kind(self.result.before, at_peak(self.result.before)) if self.result.before.steps else {}
        trained = [p for p in self.found.model.parameters() if p.requires_grad]
        if self.request.has_optimizer and trained and kinds.get("state") and not hopeless(self.result, WITHOUT_STATE):
            request = replace(self.request, optimizer=torch.optim.SGD(trained, lr=1e-3))
            yield self._way(self.spelling.optimizer, "lossy", self._plan(self.found, request))

    def _smaller(self) -> Iterator[WayOut]:
        """The largest batch, which then accumulates to the one asked for, and the longest sequence that fit."""
        if lasting(self.result.before) > self.result.budget:
            return  # a capture, which takes minutes for large models, would only say so again
        for dim in (0, 1):
            if self.call is None or (size := shared_size(self.call, dim)) is None:
                continue
            plan_at, least = partial(self._cut, self.call, dim, size), self.result.plan.peak
            way = largest_fitting(plan_at, sizes_below(size, dim), size, least, self.result.budget)
            if way is not None:
                yield way

    def _cut(self, call: Call, dim: int, whole: int, size: int) -> Tried | None:
        """The plan with the inputs cut to this size; None if the model takes no such size: no way out, and no news."""
        try:
            found = self.capture(cut(call, dim, size))
        except (MemoptError, ValueError):
            return None
        turns = self.request.accumulate * (whole // size if dim == 0 else 1)
        word, numerics = (self.spelling.seq, "lossy") if dim else (self.spelling.batch, "reordered")
        plan = self._plan(found, replace(self.request, accumulate=turns))
        way = self._way(word.format(size, whole, turns), numerics, plan)
        return Tried(size, plan.peak, way)
