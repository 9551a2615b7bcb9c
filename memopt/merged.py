"""Steps that run as one kernel, on the photograph: the side of `memopt.emission` that the timeline sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from memopt.graph import Step, StepGraph
from memopt.timeline import timeline

GENERATED = "memopt.generated.default"
UPDATE = "opt:"  # how the names of the optimizer's steps begin (memopt/optim/recorder.py)
HALF = 0.5  # a place between two steps
Order = tuple[float, int]


@dataclass(frozen=True)
class Region:
    """steps: of the program, by name, that become one; inner: views between them. step: the name it has. at: the step
    in whose place it runs, or right before it, if `ahead`. reads, writes: of values. looks: views of its results that
    stand behind it. key: of its kernel. workspace: bytes it takes inside. apart: bytes its steps move one by one;
    moved: that it moves.
    """

    step: str
    at: str
    ahead: bool
    steps: tuple[str, ...]
    inner: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    looks: tuple[str, ...]
    key: str
    workspace: int
    apart: int
    moved: int


def merged(graph: StepGraph, chosen: Iterable[Region]) -> StepGraph:
    """The photograph of the program with these regions, from that of the program without.

    What no program has, updates in the backward, moves behind the region whose result it reads.
    """
    steps, place = _placed(graph, chosen)
    made = _makers(steps, place)
    for step in sorted(steps.values(), key=lambda step: place[step.name]):
        ready = max((made[name] for name in step.reads if name in made), default=0.0)
        if step.name.startswith(UPDATE) and ready > place[step.name][0]:
            place[step.name] = (ready, 0)
            made |= dict.fromkeys(step.writes, ready)
    return replace(graph, steps=tuple(sorted(steps.values(), key=lambda step: place[step.name])))


def _placed(graph: StepGraph, chosen: Iterable[Region]) -> tuple[dict[str, Step], dict[str, Order]]:
    """(steps by name, where each stands)."""
    place: dict[str, Order] = {step.name: (at, 0) for at, step in enumerate(graph.steps)}
    steps = {step.name: step for step in graph.steps}
    for region in chosen:
        where, last = place[region.at][0] - (HALF if region.ahead else 0), steps[region.steps[-1]]
        looks = [steps.pop(name) for name in region.looks if name in steps]
        for name in (*region.steps, *region.inner):
            steps.pop(name, None)
        one = replace(
            last, name=region.step, op=GENERATED, reads=region.reads, writes=region.writes, key=region.key, flops=0,
            workspace=region.workspace, pure=True, advances=False, fusable=False,
        )  # fmt: skip
        for at, step in enumerate((one, *looks)):
            steps[step.name], place[step.name] = step, (where, at - len(looks) - 1)
    return steps, place


def _makers(steps: Mapping[str, Step], place: Mapping[str, Order]) -> dict[str, float]:
    """Tensor -> where the step stands that makes it."""
    made: dict[str, float] = {}
    for step in sorted(steps.values(), key=lambda step: place[step.name]):
        for name in step.writes:
            made.setdefault(name, place[step.name][0])
    return made


def standing(graph: StepGraph, found: Sequence[Region]) -> list[Region]:
    """Those of the regions whose places hold without others that were left out: each was placed by where those stood
    that it reads of, and that read of it."""
    kept = list(found)
    while kept:
        steps, place = _placed(graph, kept)
        made = _makers(steps, place)
        early = {name for step in steps.values() for name in step.reads
                 if not step.name.startswith(UPDATE) and made.get(name, -1.0) > place[step.name][0]}  # fmt: skip
        fallen = [region for region in kept if not early.isdisjoint((*region.reads, *region.writes, *region.looks))]
        if not fallen:
            break
        kept = [region for region in kept if region not in fallen]
    return kept


def harmless(graph: StepGraph, found: Sequence[Region], block: int) -> tuple[Region, ...]:
    """Those of the regions with which the step takes no more than without: whoever reads much at once holds it longer.

    The region that runs at the peak is left out, then the one that moves least, until that is so.
    """
    least, kept = max(timeline(graph, block), default=0), standing(graph, found)
    while kept:
        after = merged(graph, kept)
        line = timeline(after, block)
        if max(line) <= least:
            break
        at = line.index(max(line))
        mine = [region for region in kept if region.step == after.steps[at].name]
        kept.remove(mine[0] if mine else _longest(after, kept, at))
        kept = standing(graph, kept)
    return tuple(kept)


def _longest(graph: StepGraph, kept: Sequence[Region], at: int) -> Region:
    """The region that holds what it reads, or has made, over this step, the nearest behind it."""
    return min(kept, key=lambda region: (_distance(graph.position[region.step], at), region.moved))


def _distance(place: int, at: int) -> float:
    return place - at if place >= at else inf
