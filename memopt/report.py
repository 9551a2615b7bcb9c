"""The answer to "does it fit, and at what price": one value that the table, the JSON, the page and plan files read.

Everything here is derived from the step before and after the plan, its seconds and what was measured; nothing is
stored twice, so the three views cannot disagree. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from memopt.edit import Remake, added_steps
from memopt.errors import Binding, WayOut
from memopt.graph import Step, StepGraph
from memopt.overlap import COPYING, STATE, elapsed, spent
from memopt.plans import REUSED, MeasuredStep, Plan, Status, original
from memopt.timeline import Snapshot, at_peak, by_kind, peak, phase_peaks

SCHEMA = 1
SMALL_GAP = 0.01  # of the step time: above it a note says where the gap comes from
NO_BOUND = "so low a budget needs segments remade from their borders, of which no bound is known"
WHY = {
    "frontier": "the bound is the relaxation's, which may remake a value in part",
    "chain": NO_BOUND,
    "segments": NO_BOUND,
    "gaps": "the bound is of one copy a region; of values let go in between none is known",
    "greedy": "greedy proves nothing",
    REUSED: "a reused plan is not proven again",
}
PROFILED = "the measured seconds are of a step under the profiler, which slows it"


@dataclass(frozen=True, slots=True)
class Lever:
    """What one trade did: bytes it keeps out of memory across the gaps, seconds its copies take, values remade. Of a
    rewrite: bytes its backwards need not hold, and its places. Of kernels: bytes that are never stored, and places."""

    lever: str
    numerics: str
    bytes: int
    seconds: float
    count: int


@dataclass(frozen=True, slots=True)
class Decision:
    """One value that is let go and made again. bytes: of its storage, less what it was packed into; seconds: of packing
    it and of the copies made for it."""

    value: str
    lever: str
    bytes: int
    seconds: float
    source: str


@dataclass(frozen=True, slots=True)
class Held:
    """Storages of one kind made at one source line, as the peak holds them. largest: the biggest one's name."""

    source: str
    kind: str
    count: int
    bytes: int
    largest: str


@dataclass(frozen=True)
class PlanResult:
    """A planned (and perhaps measured) step.

    budget: bytes. block: allocator rounding, bytes. before, after: the step as captured and with the plan applied
    (the same if infeasible). seconds: step name -> seconds of one run; a copy costs what its original does.
    breaks: graph breaks. timings: seconds of "capture", "plan", "lower". binding, ways_out: set when infeasible.
    classes: lever -> "exact", "reordered" or "lossy". formula: the peak in batch B and sequence S. notes: what was
    assumed. rewrites: what was rewritten in the forward before it was captured: `before` has it already; kernels: what
    fused regions do, which `after` has not; plain,
    plain_seconds: then the step as the user wrote it.
    lowered: peak bytes of each phase of the compiled code, {} if the graph runs step by step.
    identity: {"graph": hash, "torch": version, "schema": "1"}, what a plan file is checked against.
    max_grad_error: what lossy levers may make of the gradient, relative; measured_grad_error: what these decisions made
    of one batch's.
    """

    model: str
    device: str
    budget: int
    block: int
    before: StepGraph = field(repr=False)
    after: StepGraph = field(repr=False)
    plan: Plan = field(repr=False)
    seconds: Mapping[str, float] = field(repr=False)
    breaks: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)
    binding: Binding | None = None
    ways_out: tuple[WayOut, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    formula: str = ""
    notes: tuple[str, ...] = ()
    rewrites: tuple[Lever, ...] = ()
    kernels: tuple[Lever, ...] = ()
    plain: StepGraph | None = field(default=None, repr=False)
    plain_seconds: Mapping[str, float] = field(default_factory=dict, repr=False)
    measured: MeasuredStep | None = None
    lowered: Mapping[str, int] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    max_grad_error: float = math.inf
    measured_grad_error: float | None = None

    @property
    def infeasible(self) -> bool:
        return self.plan.status is Status.INFEASIBLE

    @property
    def reused(self) -> bool:
        """Whether the decisions are those of a saved plan."""
        return self.plan.solver == REUSED

    @cached_property
    def peak(self) -> int:
        """Predicted peak of the planned step, bytes: of its compiled code where that is known."""
        return max(self.phases.values(), default=peak(self.after, self.block))

    @property
    def phases(self) -> Mapping[str, int]:
        """Predicted peak of each phase of the planned step, bytes."""
        return self.lowered or phase_peaks(self.after, self.block)

    @property
    def baseline(self) -> StepGraph:
        """The same step without memopt."""
        return self.before if self.plain is None else self.plain

    @cached_property
    def baseline_peak(self) -> int:
        """Predicted peak of the same step without memopt, bytes."""
        return peak(self.baseline, self.block)

    @cached_property
    def step_seconds(self) -> float:
        """Predicted seconds of the planned step."""
        return elapsed(self.after.steps, self.seconds_of)

    @cached_property
    def baseline_seconds(self) -> float:
        """Predicted seconds of the same step without memopt."""
        return sum(self.baseline_seconds_of(step) for step in self.baseline.steps)

    @cached_property
    def bound_seconds(self) -> float:
        """Seconds that no plan of these levers comes below: as if nothing waited for the optimizer's state."""
        return self._computing + self.plan.lower_bound

    @property
    def _moves_state(self) -> bool:
        return any(step.op.endswith(STATE) for step in self.before.steps)

    @cached_property
    def _computing(self) -> float:
        """Seconds of the step before planning, but for waits."""
        return sum(self.seconds_of(step) for step in self.before.steps if not step.op.startswith(COPYING))

    @property
    def gap(self) -> float:
        """How far the planned step's seconds can be above the least any plan of these levers takes, as a share."""
        waited = elapsed(self.before.steps, self.seconds_of) - self._computing
        spent = self.plan.seconds - self.plan.lower_bound + waited
        return max(0.0, spent) / self.step_seconds if self.step_seconds > 0 else 0.0

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and what is to be said of the figures: where a gap above SMALL_GAP comes from, slowed steps."""
        why = WHY.get(self.plan.solver) if self.gap > SMALL_GAP and not self.infeasible else None
        waits = "; it knows of no wait for the optimizer's state" if self._moves_state else ""
        gap = (f"gap {100 * self.gap:.2f} % of the step time: {why}{waits}",) if why else ()
        slowed = (PROFILED,) if self.measured is not None and self.measured.profiled else ()
        return (*self.notes, *gap, *self._off(), *slowed)

    def _off(self) -> tuple[str, ...]:
        """How far lossy levers put the gradient off, if any is used."""
        if not self.plan.lossy:
            return ()
        seen = self.measured_grad_error
        known = "not measured" if seen is None else f"{100 * seen:.2g} % measured on one batch"
        predicted, limit = 100 * self.plan.grad_error, 100 * self.max_grad_error
        return (f"gradient off by {predicted:.2g} % predicted, {known}; max_grad_error is {limit:.3g} %",)

    @property
    def held(self) -> bool | None:
        """Whether the measured peak stayed within the budget; None if nothing was measured."""
        return None if self.measured is None else self.measured.peak_bytes <= self.budget

    @property
    def error(self) -> float | None:
        """(measured - predicted) / predicted peak, positive if more was needed; None if nothing was measured."""
        return None if self.measured is None else (self.measured.peak_bytes - self.peak) / max(self.peak, 1)

    @cached_property
    def snapshot(self) -> Snapshot:
        """What the planned step holds at its peak."""
        return at_peak(self.after, self.block)

    def seconds_of(self, step: Step) -> float:
        found = self.seconds.get(step.name)
        return self.seconds.get(original(step.name), 0.0) if found is None else found

    def baseline_seconds_of(self, step: Step) -> float:
        """Of a step of the baseline."""
        return self.seconds_of(step) if self.plain is None else self.plain_seconds.get(step.name, 0.0)

    @cached_property
    def held_at_peak(self) -> tuple[Held, ...]:
        """What the planned step holds at its peak, by source line and kind, most bytes first; workspace apart."""
        return held(self.after, self.snapshot)

    def source_of(self, storage: str) -> str:
        """The user's line that makes this storage; '' for what lives before the step begins."""
        return self._lines.get(storage, "")

    @cached_property
    def _lines(self) -> dict[str, str]:
        return {**_sources(self.before), **_sources(self.after)}

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """One a remade value and trade, in the order of the plan. Their seconds add up to the copies' seconds."""
        lines, spent = _sources(self.before), self._spent()
        chosen = {} if self.infeasible else {(r.value, r.trade): bytes_let_go(self.before, r) for r in self.plan.chosen}
        return tuple(
            Decision(value, lever, size, spent.get((value, lever), 0.0), lines.get(value, ""))
            for (value, lever), size in chosen.items()
        )

    def _spent(self) -> dict[tuple[str, str], float]:
        """(value, trade) -> seconds its copies add. A copy that remakes several values is charged to the first."""
        owner, added = _owners(self.before, self.plan.chosen), {s.name for s in added_steps(self.before, self.after)}
        found: dict[tuple[str, str], float] = {}
        for step, seconds in spent(self.after.steps, self.seconds_of):
            key = owner.get(step.name) or owner.get(original(step.name))
            if key is not None and step.name in added:
                found[key] = found.get(key, 0.0) + seconds
        return found

    def numerics_of(self, lever: str) -> str:
        """The lever's declared class. Undeclared ones count as lossy, but recompute, which repeats the same steps."""
        return self.classes.get(lever, "exact" if lever == "recompute" else "lossy")

    @cached_property
    def levers(self) -> tuple[Lever, ...]:
        """The rewrites of the forward, and the decisions summed by trade, most bytes first."""
        rows = [*self.rewrites, *self.kernels]
        for name in dict.fromkeys(decision.lever for decision in self.decisions):
            mine = [decision for decision in self.decisions if decision.lever == name]
            nbytes, seconds = sum(d.bytes for d in mine), sum(d.seconds for d in mine)
            rows.append(Lever(name, self.numerics_of(name), nbytes, seconds, len(mine)))
        return tuple(sorted(rows, key=lambda row: (-row.bytes, row.lever)))

    def to_json(self) -> dict[str, Any]:
        """The object of the contract (docs: JSON), ready for `json.dumps`; bytes and seconds throughout."""
        out: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model,
            "device": self.device,
            "budget_bytes": self.budget,
            "status": self.plan.status.value,
            "predicted": {
                "peak_bytes": self.peak,
                "seconds": self.step_seconds,
                "phases": dict(self.phases),
            },
            "baseline": {"peak_bytes": self.baseline_peak, "seconds": self.baseline_seconds},
            "floor_bytes": self.plan.floor,
            "lower_bound_seconds": self.bound_seconds,
            "gap": self.gap,
            "levers": [_lever_json(lever) for lever in self.levers],
            "decisions": [_fields(decision) for decision in self.decisions],
            "graph": {"steps": len(self.before.steps), "storages": len(_used(self.before)), "breaks": self.breaks},
            "timings": dict(self.timings),
            "at_peak": by_kind(self.after, self.snapshot) if self.after.steps else {},
            "grad_error": {
                "max": self.max_grad_error if math.isfinite(self.max_grad_error) else None,
                "predicted": self.plan.grad_error,
                "measured": self.measured_grad_error,
            },
            "formula": self.formula,
            "notes": list(self.remarks),
        }
        return {**out, **self._measured_json(), **self._infeasible_json()}

    def _measured_json(self) -> dict[str, Any]:
        if self.measured is None:
            return {}
        return {"measured": _fields(self.measured), "error": self.error, "held": self.held}

    def _infeasible_json(self) -> dict[str, Any]:
        if not self.infeasible:
            return {}
        binding = _fields(self.binding) | {"kinds": dict(self.binding.kinds)} if self.binding else None
        return {"binding": binding, "ways_out": [_fields(way) for way in self.ways_out]}


def _fields(value: Any) -> dict[str, Any]:
    """A flat dataclass as a dict; mappings inside become plain dicts."""
    pairs = ((name, getattr(value, name)) for name in value.__dataclass_fields__)
    return {name: dict(item) if isinstance(item, Mapping) else item for name, item in pairs}


def _lever_json(lever: Lever) -> dict[str, Any]:
    """`class` is a keyword of Python, so the dataclass says `numerics`."""
    return {("class" if name == "numerics" else name): value for name, value in _fields(lever).items()}


def _sources(graph: StepGraph) -> dict[str, str]:
    """Storage -> source line of the step that touches it first; inputs have none of their own."""
    lines = {name: graph.steps[at[0]].source for name, at in graph.uses.items()}
    return {**lines, **dict.fromkeys(graph.input_storages, "")}


def held(graph: StepGraph, snapshot: Snapshot) -> tuple[Held, ...]:
    """The snapshot's storages by source line and kind, most bytes first. Layers that repeat a line share a row."""
    lines, rows = _sources(graph), dict[tuple[str, str], list[tuple[str, int]]]()
    for name, size in snapshot.storages:
        rows.setdefault((lines.get(name, ""), graph.storages[name].kind), []).append((name, size))
    out = (
        Held(source, kind, len(items), sum(size for _, size in items), items[0][0])
        for (source, kind), items in rows.items()
    )
    return tuple(sorted(out, key=lambda row: (-row.bytes, row.source, row.kind)))


def bytes_let_go(graph: StepGraph, remake: Remake) -> int:
    """Bytes of the value's storage, less what stays of it."""
    return graph.storages[remake.value].nbytes - sum(storage.nbytes for _, storage in remake.made)


def _used(graph: StepGraph) -> set[str]:
    """Storages the step holds at some moment: an edit leaves those of dropped steps declared."""
    return {*graph.input_storages, *graph.output_storages, *graph.uses}


def _owners(graph: StepGraph, chosen: tuple[Remake, ...]) -> dict[str, tuple[str, str]]:
    """Step name -> the (value, trade) its copies are charged to: the first remake that packs or unpacks with it."""
    owner: dict[str, tuple[str, str]] = {}
    trade = {remake.value: remake.trade for remake in reversed(chosen)}
    for remake in chosen:
        for step in (*remake.pack, *remake.unpack):
            owner.setdefault(step.name, (remake.value, remake.trade))
    for step in graph.steps:  # views are copied with their base though no remake lists them
        if value := next((graph.storage_of(name) for name in step.writes if graph.storage_of(name) in trade), None):
            owner.setdefault(step.name, (value, trade[value]))
    return owner
