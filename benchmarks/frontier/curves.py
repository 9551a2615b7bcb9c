"""One step planned at a row of budgets, with each set of levers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch

from memopt.accuracy import Accuracy
from memopt.api import make_request
from memopt.capture import Survey, survey
from memopt.models import load
from memopt.noise import LOSSY, Noise
from memopt.passes import TRADES
from memopt.passes.offload import OffloadDisk, OffloadHost
from memopt.pipeline import Costs, make_plan, prepare, silent
from memopt.profiling import measured_costs
from memopt.refusal import ANY
from memopt.report import PlanResult
from memopt.request import Request
from memopt.runtime import disk
from memopt.smaller import Call
from memopt.workbench import bench
from memopt.workload import Workload

Row = dict[str, Any]
ALL = "all levers"
EXACT = "exact levers"
ABOVE_FLOOR = 1.02
HOST_MEMORY = "256GB"  # beside a device that is not here


@dataclass(frozen=True)
class Subject:
    """A captured step, with what is known of its costs and of what rounding does to its gradient."""

    name: str
    found: Survey
    request: Request
    costs: Costs
    noise: Noise

    def planned(self, levers: Sequence[str], budget: int) -> PlanResult:
        """The plan with these levers and no others."""
        off = frozenset(trade.name for trade in TRADES) - {*levers}
        request = replace(self.request, off=off, budget=max(budget, 1))
        return make_plan(self.found, request, self.costs, 0.0, silent, noise=self.noise).result


def on_cpu(name: str, work: Workload, error: float, disk_share: float) -> Subject:
    """A real step on this machine: operations measured, and what rounding does on its batch.

    disk_share: how much of its free peak may lie on disk. Without a limit a disk behind the page cache, which takes
    next to no time, would do alone.
    """
    torch.manual_seed(0)
    model, inputs = work.build(), work.inputs(work.batch, work.seq)
    request = make_request(
        _cpu(), 1, None, LOSSY, "reordered", "eager", "", 1, name, max_grad_error=error,
    )  # fmt: skip
    request = replace(request, disk=(ANY, disk.use(tempfile.gettempdir(), ANY).codec))
    call: Call = ((), dict(inputs))
    found = survey(model, *call, prepare("eager"), "eager", exact=False)
    accuracy = Accuracy()
    accuracy.probe(found, call, request)
    costs = measured_costs([capture.program for capture in found.captures], request.device, True)
    free = Subject(name, found, request, costs, accuracy.noise)
    limit = int(disk_share * free.planned((), 1 << 60).baseline_peak)
    return replace(free, request=replace(request, disk=(limit, request.disk[1])))


def on_paper(preset: str, device: str, batch: int, seq: int, error: float) -> Subject:
    """A step planned for a device that is not here: the roofline's seconds, and assumed noise."""
    made = bench(load(preset), batch, seq, "bf16", "adamw", device)
    model, inputs = made.build_fake()
    target = replace(made.target, memory=1 << 50)
    request = make_request(
        target, 1, made.optimizer_over(model), LOSSY, "reordered", "inductor", "", 1, preset, HOST_MEMORY,
        max_grad_error=error,
    )  # fmt: skip
    found = survey(model, (), inputs, prepare("inductor"), "inductor")
    return Subject(named(preset, device), found, request, Costs(), Noise())


def named(preset: str, device: str) -> str:
    """What a step on paper is called."""
    return f"{preset} on {device}"


def _cpu() -> Any:
    from memopt.runtime.here import here

    return here(torch.device("cpu"))


def sets_of(subject: Subject) -> Mapping[str, tuple[str, ...]]:
    """Each lever alone, all exact ones, all."""
    room = {OffloadHost: subject.request.host, OffloadDisk: subject.request.disk}
    names = [t.name for t in TRADES if t not in room or room[t][0]]
    exact = tuple(name for name in names if name not in LOSSY)
    return {**{name: (name,) for name in names}, EXACT: exact, ALL: tuple(names)}


def rows(subject: Subject, shares: Sequence[float]) -> Iterator[Row]:
    """A row a set of levers and share of the peak without a plan; a little above the floor of all levers last."""
    free = subject.planned((), 1 << 60)
    least = ABOVE_FLOOR * subject.planned(sets_of(subject)[ALL], 1).plan.peak / free.baseline_peak
    for label, budget in ((share, int(share * free.baseline_peak)) for share in (*shares, least)):
        for name, levers in sets_of(subject).items():
            result = subject.planned(levers, budget)
            yield {
                "subject": subject.name, "levers": name, "share": label, "budget": budget, "free": free.baseline_peak,
                "fits": not result.infeasible, "peak": result.plan.peak, "added": result.plan.seconds,
                "step": free.baseline_seconds, "bound": result.plan.lower_bound, "gap": result.gap,
                "grad_error": result.plan.grad_error,
                "mix": {lever.lever: lever.bytes for lever in result.levers},
                "plan_seconds": result.timings["plan"],
            }  # fmt: skip


def seconds(row: Row) -> float:
    """Added seconds; inf where nothing fits."""
    return float(row["added"]) if row["fits"] else inf
