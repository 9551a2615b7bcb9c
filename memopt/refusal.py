"""An infeasible step answered: the floor, what sets it, and what would make it run, each with its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from memopt.capture import Survey
from memopt.errors import BudgetError, MemoptError, WayOut
from memopt.passbase import Numerics
from memopt.passes import TRADES
from memopt.pipeline import Costs, Request, make_plan, silent
from memopt.report import PlanResult
from memopt.timeline import at_peak, by_kind
from memopt.units import DECIMAL, format_seconds, format_size

ORDER = {"exact": 0, "reordered": 1, "lossy": 2}
Call = tuple[tuple[Any, ...], dict[str, Any]]


def infeasible(result: PlanResult) -> BudgetError:
    """The error for a plan that does not fit: what was asked, the floor, what sets it, the ways out."""
    asked, floor = format_size(result.budget), format_size(result.plan.floor)
    lines = [f"{asked} asked; the least this step can run in is {floor}."]
    if (binding := result.binding) is not None:
        made_of = ", ".join(f"{kind} {_short(size)}" for kind, size in binding.kinds)
        where = ", ".join(filter(None, (binding.op, f"step {binding.step}", binding.source)))
        lines += [f"  set by    {where}", f"  made of   {made_of}"]
    for at, way in enumerate(result.ways_out):
        lines.append(f"  {'ways out' if at == 0 else '':8}  {_said(way, result.budget)}")
    return BudgetError(
        "\n".join(lines),
        floor_bytes=result.plan.floor,
        budget_bytes=result.budget,
        binding=result.binding,
        ways_out=result.ways_out,
    )


def _said(way: WayOut, budget: int) -> str:
    over = (
        "" if way.peak_bytes <= budget or way.change.startswith(("budget", "--budget")) else ", still over the budget"
    )
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


@dataclass(frozen=True)
class Spelling:
    """How a door writes its options."""

    budget: str = 'budget="{}"'
    batch: str = "{} instead of {} along dimension 0 of the inputs, accumulated over 2 backwards"
    seq: str = "{} instead of {} along dimension 1 of the inputs (the sequence)"
    optimizer: str = "optimizer=torch.optim.SGD(...)"
    allow: str = 'allow=("{}",)'
    numerics: str = 'numerics="reordered", lowering="eager"'
    on: str = 'passes without "-{}"'


COMMAND_LINE = Spelling(
    budget="--budget {}",
    batch="--batch {} --accumulate 2",
    seq="--seq {}",
    optimizer="--optimizer sgd",
    allow="--allow {}",
    numerics="--numerics reordered --lowering eager",
    on="--passes without -{}",
)


@dataclass(frozen=True)
class Refused:
    """A refused request, planned anew under each change that may help.

    price: the costs of a survey's operations. capture: surveys a call with other inputs.
    call: the positional and keyword inputs, or None if they are not known. reordered: surveys that call as it runs with
    reordered numerics, where that runs other operations; else None.
    """

    result: PlanResult
    found: Survey
    request: Request
    price: Callable[[Survey], Costs]
    call: Call | None
    capture: Callable[[Call], Survey]
    reordered: Callable[[Call], Survey] | None = None
    spelling: Spelling = Spelling()

    def ways_out(self) -> tuple[WayOut, ...]:
        """Each change with the peak and the seconds it leads to; within the budget first, exact before lossy."""
        plan = self.result.plan
        ways = [WayOut(self.spelling.budget.format(round_up(plan.floor)), plan.floor, plan.seconds)]
        ways += [
            way
            for way in (*self._levers(), *self._numerics(), *self._optimizers(), *self._halves())
            if way.peak_bytes < plan.floor
        ]
        return tuple(sorted(ways, key=lambda w: (w.peak_bytes > self.result.budget, ORDER[w.numerics], w.peak_bytes)))

    def _planned(self, change: str, numerics: str, found: Survey, request: Request) -> WayOut:
        """What this change leads to: the plan's peak if it fits, else the floor it leaves."""
        plan = make_plan(found, request, self.price(found), 0.0, silent).result.plan
        return WayOut(change, plan.peak, plan.seconds, numerics)

    def _levers(self) -> Iterator[WayOut]:
        """Levers that were switched off, or are lossy and were not named."""
        for trade in TRADES:
            if trade.name in self.request.off:
                word = self.spelling.allow if trade.numerics is Numerics.LOSSY else self.spelling.on
                request = replace(self.request, off=self.request.off - {trade.name})
                yield self._planned(word.format(trade.name), trade.numerics.value, self.found, request)

    def _numerics(self) -> Iterator[WayOut]:
        """A recurrent layer that is one operation when exact, and its cells otherwise."""
        if self.reordered is not None and self.call is not None:
            request = replace(self.request, numerics="reordered")
            yield self._planned(self.spelling.numerics, "reordered", self.reordered(self.call), request)

    def _optimizers(self) -> Iterator[WayOut]:
        """One without state, if this one has some."""
        kinds = by_kind(self.result.before, at_peak(self.result.before)) if self.result.before.steps else {}
        trained = [p for p in self.found.model.parameters() if p.requires_grad]
        if self.request.has_optimizer and trained and kinds.get("state"):
            request = replace(self.request, optimizer=torch.optim.SGD(trained, lr=1e-3))
            yield self._planned(self.spelling.optimizer, "lossy", self.found, request)

    def _halves(self) -> Iterator[WayOut]:
        if self.call is None:
            return
        for dim, word, numerics in ((0, self.spelling.batch, "reordered"), (1, self.spelling.seq, "lossy")):
            if (size := shared_size(self.call, dim)) is None:
                continue
            try:
                found = self.capture(halved(self.call, dim, size))
            except (MemoptError, ValueError):  # the model takes no other size: no way out, and no news
                continue
            twice = self.request.accumulate * 2 if dim == 0 else self.request.accumulate
            yield self._planned(word.format(size // 2, size), numerics, found, replace(self.request, accumulate=twice))


def shared_size(call: Call, dim: int) -> int | None:
    """The even size that all inputs have along this dimension, else None. Dimension 1 counts for token ids alone."""
    tensors = [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    if dim == 1 and any(tensor.dim() != 2 or tensor.is_floating_point() for tensor in tensors):
        return None
    sizes = {int(tensor.shape[dim]) for tensor in tensors}
    size = sizes.pop() if len(sizes) == 1 else 0
    return size if size and size % 2 == 0 else None


def halved(call: Call, dim: int, size: int) -> Call:
    """The call with every tensor cut to its first half along the dimension."""

    def half(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(dim, 0, size // 2).contiguous() if tensor.dim() > dim else tensor

    made: Call = tree_map_only(torch.Tensor, half, call)
    return made
