"""Plan files (`plan.memopt.json`): a plan saved, checked, compared and applied again on another run or rank.

A file names steps and values, never tensors, and carries its own sha256, so that an edit or a cut is seen before
anything is built on it. The same plan gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from memopt import __version__
from memopt.edit import Remake
from memopt.errors import PlanFileError
from memopt.files import write_atomic
from memopt.graph import StepGraph
from memopt.overlap import overlapped
from memopt.report import SCHEMA, PlanResult, bytes_let_go

MARK = "memopt plan"  # the file's `format`: tells a plan from any other JSON


@dataclass(frozen=True)
class SavedRemake:
    """A remake by names. bytes: of the value's storage, less what it was packed into; seconds: of its unpack and pack
    steps alone. drained, fetched: as in `memopt.edit.Remake`."""

    trade: str
    value: str
    span: tuple[str, str]
    unpack: tuple[str, ...]
    pack: tuple[str, ...]
    seconds: float
    bytes: int
    source: str
    drained: str = ""
    fetched: str = ""

    @property
    def key(self) -> tuple[str, str, tuple[str, str], tuple[str, ...]]:
        """What makes two remakes the same one."""
        return (self.trade, self.value, self.span, self.unpack[:1] if self.drained else self.unpack)


@dataclass(frozen=True)
class PlanFile:
    """What a plan file holds. budget, peak, baseline_peak: bytes; seconds, baseline_seconds: of one step.

    identity: {"graph": hash, "torch": version, "schema": "1"} of the run that saved it; levers: as in the JSON.
    """

    identity: Mapping[str, str]
    memopt: str
    model: str
    device: str
    budget: int
    status: str
    peak: int
    baseline_peak: int
    seconds: float
    baseline_seconds: float
    phases: Mapping[str, int]
    levers: tuple[Mapping[str, Any], ...]
    remakes: tuple[SavedRemake, ...] = field(repr=False)

    def chosen(self, graph: StepGraph, offers: Iterable[Remake] = ()) -> tuple[Remake, ...]:
        """The remakes for this graph: the equal offer where there is one, else built from the graph's own steps.

        Raises PlanFileError if the graph lacks a step or value that the file names.
        """
        known: dict[Any, Remake] = {}
        for offer in offers:
            steps = tuple(step.name for step in offer.unpack)
            known[offer.trade, offer.value, offer.span, steps] = offer
            known.setdefault((offer.trade, offer.value, steps), offer)
        return tuple(_timed(saved, known.get(saved.key) or _rebuilt(saved, graph, known)) for saved in self.remakes)


def _timed(saved: SavedRemake, remake: Remake) -> Remake:
    """The remake with its copies under way between the same steps."""
    return overlapped(remake, saved.drained, saved.fetched) if saved.drained else remake


def _rebuilt(saved: SavedRemake, graph: StepGraph, offers: Mapping[Any, Remake]) -> Remake:
    """A remake that no trade offers for this span: of the graph's own steps, or as offered for another one."""
    if (like := offers.get((saved.trade, saved.value, saved.key[-1]))) and {*saved.span} <= graph.position.keys():
        return replace(like, span=saved.span)
    if saved.pack:
        how = "allow the lever, or give it its disk, as when the plan was made, or plan anew"
        raise PlanFileError(f"the plan uses {saved.trade!r} on {saved.value!r}, which this call does not offer; {how}")
    named = (*saved.span, *saved.unpack, *saved.pack)
    if missing := [name for name in named if name not in graph.position]:
        raise PlanFileError(f"the plan names step {missing[0]!r}, which this model's step does not have; plan anew")
    if saved.value not in graph.storages:
        raise PlanFileError(f"the plan remakes {saved.value!r}, which this model's step does not hold; plan anew")
    unpack, pack = (tuple(graph.steps[graph.position[n]] for n in names) for names in (saved.unpack, saved.pack))
    if not any(saved.value in graph.created(step) for step in unpack):
        raise PlanFileError(f"the plan remakes {saved.value!r} by steps that do not make it here; plan anew")
    return Remake(saved.trade, saved.value, saved.span, unpack=unpack, pack=pack, seconds=saved.seconds)


def to_plan_file(result: PlanResult) -> PlanFile:
    """The plan of this result by names. Raises PlanFileError if it is infeasible: there is then nothing to save."""
    if result.infeasible:
        raise PlanFileError("an infeasible plan cannot be saved: no choice holds the budget")
    out = result.to_json()
    return PlanFile(
        identity=dict(result.identity),
        memopt=__version__,
        model=result.model,
        device=result.device,
        budget=result.budget,
        status=result.plan.status.value,
        peak=result.peak,
        baseline_peak=result.baseline_peak,
        seconds=result.step_seconds,
        baseline_seconds=result.baseline_seconds,
        phases=out["predicted"]["phases"],
        levers=tuple(out["levers"]),
        remakes=tuple(_saved(remake, result) for remake in result.plan.chosen),
    )


def _saved(remake: Remake, result: PlanResult) -> SavedRemake:
    unpack, pack = (tuple(step.name for step in steps) for steps in (remake.unpack, remake.pack))
    nbytes, source = bytes_let_go(result.before, remake), result.source_of(remake.value)
    return SavedRemake(
        remake.trade, remake.value, remake.span, unpack, pack, remake.seconds, nbytes, source,
        remake.drained, remake.fetched,
    )  # fmt: skip


def dumps(plan: PlanFile) -> str:
    """The file's text: sorted keys, one decision a line for a readable diff, its own sha256 at the end."""
    body = {"format": MARK, "schema": SCHEMA, **asdict(plan)}
    remakes = ",\n  ".join(_canonical(remake) for remake in body.pop("remakes"))
    lines = [f"{json.dumps(key)}: {_canonical(value)}" for key, value in sorted(body.items())]
    lines.append(f'"remakes": [\n  {remakes}\n ]' if remakes else '"remakes": []')
    digest = _digest(json.loads("{" + ",".join(lines) + "}"))
    return "{\n " + ",\n ".join([*lines, f'"sha256": "{digest}"']) + "\n}\n"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body).encode()).hexdigest()


def save_plan(result: PlanResult, path: str | Path) -> PlanFile:
    """Write the plan at `path`, whole or not at all. Raises PlanFileError if infeasible, OSError as `open` does."""
    plan = to_plan_file(result)
    write_atomic(path, dumps(plan))
    return plan


def load_plan(path: str | Path) -> PlanFile:
    """Read a plan file. Raises PlanFileError, in one sentence, if it is missing, truncated, edited or foreign."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanFileError(f"cannot read plan file {path}: {error.strerror or error}") from error
    except ValueError as error:  # broken UTF-8
        raise PlanFileError(f"{path} is cut short or not JSON ({error}); plan again and save") from error
    return loads(text, str(path))


def loads(text: str, path: str) -> PlanFile:
    """The plan of a file's text. path: what errors call it. Raises PlanFileError as `load_plan` does."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise PlanFileError(f"{path} is cut short or not JSON ({error}); plan again and save") from error
    if not isinstance(body, dict) or body.get("format") != MARK:
        raise PlanFileError(f"{path} is not a memopt plan file; `memopt plan ... --save FILE` writes one")
    if body.get("schema") != SCHEMA:
        found = body.get("schema")
        raise PlanFileError(f"{path} has schema {found}, this memopt reads schema {SCHEMA}; plan again and save")
    if body.pop("sha256", None) != _digest(body):
        raise PlanFileError(f"{path} was changed after it was saved (its sha256 does not match); plan again and save")
    try:
        return _from_body(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanFileError(f"{path} lacks a field of a plan file ({error}); plan again and save") from error


def _from_body(body: dict[str, Any]) -> PlanFile:
    known = {field.name for field in fields_of(PlanFile)}  # earlier files have a floor too, which no plan knows
    fields = {key: value for key, value in body.items() if key in known}
    fields["levers"] = tuple(fields["levers"])
    fields["remakes"] = tuple(_from_names(saved) for saved in fields["remakes"])
    return PlanFile(**fields)


def _from_names(saved: dict[str, Any]) -> SavedRemake:
    first, last = saved["span"]
    lists = {"span": (first, last), "unpack": tuple(saved["unpack"]), "pack": tuple(saved["pack"])}
    return SavedRemake(**{**saved, **lists})


REASONS = {
    "schema": "the plan has schema {saved}, this memopt uses {here}",
    "torch": "the plan was made with torch {saved}, this is torch {here}",
    "graph": "the plan is of another model, shape or setting (its step is {saved}, this one is {here})",
}


def check_identity(plan: PlanFile, identity: Mapping[str, str]) -> None:
    """Raise PlanFileError if the plan was made for another schema, torch version or step than `identity` states."""
    for key, sentence in REASONS.items():
        saved, here = plan.identity.get(key, "unknown"), identity.get(key, "unknown")
        if saved != here:
            raise PlanFileError(f"{sentence.format(saved=brief(saved), here=brief(here))}; plan again and save")


def brief(name: str) -> str:
    """A version or hash short enough for a sentence: long ones (a hash a graph) are hashed, so that they stay apart."""
    return name if len(name) <= 16 else hashlib.sha256(name.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class PlanDiff:
    """What separates two plans. removed: remakes only the first has; added: only the second; kept: in both.

    changes: field -> (first, second) where they differ; bytes and seconds as in `PlanFile`.
    """

    changes: Mapping[str, tuple[Any, Any]]
    removed: tuple[SavedRemake, ...]
    added: tuple[SavedRemake, ...]
    kept: int

    @property
    def same(self) -> bool:
        return not (self.changes or self.removed or self.added)

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`."""
        changes = {key: {"a": a, "b": b} for key, (a, b) in self.changes.items()}
        lists = {name: [asdict(r) for r in getattr(self, name)] for name in ("removed", "added")}
        return {"same": self.same, "changes": changes, **lists, "kept": self.kept}


COMPARED = ("model", "device", "budget", "status", "peak", "baseline_peak", "seconds", "baseline_seconds", "memopt")


def diff_plans(a: PlanFile, b: PlanFile) -> PlanDiff:
    """Compare two plans decision by decision."""
    changes = {name: (getattr(a, name), getattr(b, name)) for name in COMPARED}
    changes |= {name: (a.identity.get(name), b.identity.get(name)) for name in REASONS}
    ours, theirs = {r.key: r for r in a.remakes}, {r.key: r for r in b.remakes}
    return PlanDiff(
        changes={name: pair for name, pair in changes.items() if pair[0] != pair[1]},
        removed=tuple(r for key, r in ours.items() if key not in theirs),
        added=tuple(r for key, r in theirs.items() if key not in ours),
        kept=len(ours.keys() & theirs.keys()),
    )
