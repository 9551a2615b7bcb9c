"""The step as a fusing compiler runs it: pointwise and reduction steps between two library calls become one step.

Inside a fused step nothing is stored; only what is read elsewhere is. Planning on the unfused graph would pay, in bytes
and seconds, for temporaries that Inductor never makes. `fused` contracts the graph for the solver, `expanded` turns the
remakes the solver chose back into remakes of the real steps. What the code really holds is rehearsed afterwards
(memopt/tuning.py), so this model steers the choice and decides nothing about the promise.

Assumed: steps that touch the same values and have no library call between them fuse; a scatter into a fill of its own
writes into it (torch/_inductor/lowering.py, index_put). Left out: values Inductor recomputes in several kernels,
kernels it splits for their size. `kernels` says which steps of an edited graph these
groups are, for a compiler that is told to keep to them (memopt/fences.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import networkx as nx

from memopt.cost import moved_bytes
from memopt.edit import Remake, edit
from memopt.graph import Step, StepGraph
from memopt.plans import original

# Scatters whose first argument Inductor has them write into, once it is a buffer of its own.
SCATTERS = frozenset(
    f"aten.{name}.default" for name in ("index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate")
) | {"aten.scatter_add.default", "aten.scatter.src", "aten.scatter.value"}


class Fences(IntEnum):
    """How far the compiler is held to the plan's kernels. Each costs some speed and holds fewer bytes than the last.

    FREE: it fuses as it likes. KERNELS: nothing fuses across the plan's kernels. TIGHT: nor does it keep dead buffers
    for a later use.
    """

    FREE = 0
    KERNELS = 1
    TIGHT = 2


@dataclass(frozen=True)
class Fused:
    """graph: contracted. original: before. members: fused step -> the steps inside, in order.

    lifted: views of what a fused step makes that stand behind it, and in no members, as they are read outside of it.
    """

    graph: StepGraph
    original: StepGraph
    members: Mapping[str, tuple[Step, ...]] = field(repr=False)
    lifted: frozenset[str] = frozenset()


def fused(graph: StepGraph) -> Fused:
    """Contract every group of fusable steps between two library calls that share values."""
    steps: list[Step] = []
    members: dict[str, tuple[Step, ...]] = {}
    lifted: set[str] = set()
    fills = _fills(graph)
    for window in _windows(graph, frozenset(fill.name for fill in fills.values())):
        for group in _groups(graph, window):
            group = [*(fills[step.name] for step in group if step.name in fills), *group]
            if any(step.fusable and not graph.is_view(step) for step in group):
                looks = _lifted(graph, group)
                lifted.update(names := {step.name for step in looks})
                kernel = [step for step in group if step.name not in names]
                merged = _merged(graph, kernel, looks)
                members[merged.name] = tuple(kernel)
                steps.extend((merged, *looks))
            else:
                steps.extend(group)
    return Fused(replace(graph, steps=tuple(steps)), graph, members, frozenset(lifted))


def _fills(graph: StepGraph) -> dict[str, Step]:
    """Scatter -> the fill that it alone reads, and writes into: made where it is needed, with no bytes of its own."""
    found: dict[str, Step] = {}
    for at, step in enumerate(graph.steps):
        if step.reads and step.op in SCATTERS:
            target = graph.storage_of(step.reads[0])
            fill = graph.steps[graph.uses[target][0]]
            alone = graph.uses[target] == (graph.position[fill.name], at) and target not in graph.output_storages
            if alone and fill.fusable and not fill.reads and fill.phase == step.phase:
                found[step.name] = fill
    return found


def unfused(graph: StepGraph) -> Fused:
    """The graph as it is, for the eager lowering."""
    return Fused(graph, graph, {})


def _windows(graph: StepGraph, moved: frozenset[str] = frozenset()) -> Iterable[list[Step]]:
    """Runs of fusable steps of one phase; any other step is a window of its own. moved: steps that run elsewhere."""
    run: list[Step] = []
    for step in (step for step in graph.steps if step.name not in moved):
        fusable = step.fusable or graph.is_view(step)
        if run and (not fusable or run[-1].phase != step.phase):
            yield run
            run = []
        if fusable:
            run.append(step)
        else:
            yield [step]
    if run:
        yield run


def _groups(graph: StepGraph, window: Sequence[Step]) -> list[list[Step]]:
    """Steps of a window that share values made in it, together; groups in the order of their last step.

    A view of what an earlier window made stays by itself: a copy of it must not need a copy of the kernel it feeds.
    """
    if len(window) == 1:
        return [list(window)]
    fresh = {storage for step in window for storage in graph.created(step)}
    made = {name: at for at, step in enumerate(window) for name in step.writes if graph.storage_of(name) in fresh}
    links: nx.Graph = nx.Graph()
    links.add_nodes_from(range(len(window)))
    for at, step in enumerate(window):
        links.add_edges_from((made[name], at) for name in step.reads if name in made)
    groups = [sorted(part) for part in nx.connected_components(links)]
    return [[window[at] for at in group] for group in sorted(groups, key=lambda group: group[-1])]


def _lifted(graph: StepGraph, group: Sequence[Step]) -> list[Step]:
    """The group's views that are read outside of it, and those they look at, in order. They stand behind the kernel, as
    views of what it writes: a copy or an unpack of the value then serves who reads a view of it, and not a copy of the
    kernel."""
    names, found = {step.name for step in group}, list[Step]()
    wanted = set(graph.outputs)
    for step in (step for step in reversed(group) if graph.is_view(step)):
        if any(name in wanted or _read_outside(graph, name, names) for name in step.writes):
            wanted.update(step.reads)
            found.append(step)
    return found[::-1]


def _merged(graph: StepGraph, group: Sequence[Step], looks: Sequence[Step]) -> Step:
    """One step for the group: reads what comes from outside, writes what is read outside, by these views too."""
    inner = {name for step in (*group, *looks) for name in step.writes}
    names = {step.name for step in group}
    outputs = set(graph.outputs)
    writes = [n for step in group for n in step.writes if n in outputs or _read_outside(graph, n, names)]
    reads = dict.fromkeys(n for step in group for n in step.reads if n not in inner)
    first, last = group[0], group[-1]
    plain = len(group) == 1
    return replace(
        last,
        op=first.op if plain else "fused",
        reads=tuple(reads),
        writes=tuple(writes),
        key=first.key if plain else "+".join(step.key for step in group),
        flops=sum(step.flops for step in group),
        workspace=max(step.workspace for step in group),
        pure=all(step.pure for step in group),
        advances=any(step.advances for step in group),
        fused=last.op not in SCATTERS,  # which cannot write over what it scatters
    )


def _read_outside(graph: StepGraph, tensor: str, names: set[str]) -> bool:
    return any(graph.steps[at].name not in names for at in graph.readers.get(tensor, ()))


def fused_seconds(found: Fused, seconds: Mapping[str, float]) -> dict[str, float]:
    """Step name -> seconds: a fused step's members cost the share of their bytes that still moves."""
    out = dict(seconds)
    for name, group in found.members.items():
        moved = sum(moved_bytes(found.original, step) for step in group)
        merged = found.graph.steps[found.graph.position[name]]
        still = moved_bytes(found.graph, merged)
        out[name] = sum(seconds.get(step.name, 0.0) for step in group) * min(1.0, still / moved if moved else 0.0)
    return out


def expanded(found: Fused, remakes: Iterable[Remake]) -> tuple[Remake, ...]:
    """The same choice on the original graph: with a value of a fused step, all that it is made of inside that step.

    A sibling it is made of, read outside as well, is read again only where the plan still holds it.
    """
    remakes = tuple(remakes)
    held = _last_uses(found, remakes) if found.members else {}
    chosen: dict[tuple[str, tuple[str, str]], Remake] = {}
    for remake in remakes:
        span = _span(found, remake)
        begun = _first(found, remake.fetched) if remake.fetched else ""
        chosen[remake.value, span] = replace(remake, span=span, fetched=begun)
        for step in remake.unpack:
            if step.name in found.members:
                del chosen[remake.value, span]
                for value, member in _ingredients(found, step.name, remake.value).items():
                    if value == remake.value or held.get(value, -1) < found.graph.position[remake.span[0]]:
                        chosen.setdefault((value, span), Remake(remake.trade, value, span, (member,)))
    return tuple(chosen.values())


def _ingredients(found: Fused, merged: str, value: str) -> dict[str, Step]:
    """Storage -> the member that makes it, for `value` and all it is made of inside the fused step."""
    graph = found.original
    makers: dict[str, Step] = {}
    for member in found.members[merged]:
        makers.update((storage, member) for storage in graph.created(member))
    wanted: dict[str, Step] = {}
    stack = [value]
    while stack:
        storage = stack.pop()
        if storage in makers and storage not in wanted:
            wanted[storage] = makers[storage]
            stack.extend(graph.storage_of(name) for name in makers[storage].reads)
    return wanted


def _last_uses(found: Fused, remakes: Sequence[Remake]) -> dict[str, int]:
    """Storage -> position, among the contracted graph's own steps, at which the plan touches its original last."""
    after = edit(found.graph, remakes)
    last: dict[str, int] = {}
    place = 0
    for step in after.steps:
        place = found.graph.position.get(step.name, place)
        last.update((storage, place) for storage in after.touched(step))
    return last


def kernels(found: Fused, after: StepGraph) -> dict[str, str]:
    """Step -> name of the kernel the plan has in mind for it, for steps that compute and may fuse.

    after: the original graph, edited. Copies fuse with copies of the same window made for the same moment.
    """
    merged = {member.name: name for name, group in found.members.items() for member in group}
    out: dict[str, str] = {}
    for place, window in enumerate(_windows(after)):
        for step in window:
            own = step.name in found.original.position
            name = merged.get(step.name if own else original(step.name))
            if name is not None and after.created(step):
                out[step.name] = f"{name}@{place}" if own else f"{name}@{place} again"
    return out


def leaving(after: StepGraph, kernel: Mapping[str, str]) -> set[str]:
    """Steps of a kernel whose result a step outside of it reads: what the kernel has to store."""
    maker = {storage: step.name for step in after.steps for storage in after.created(step)}
    out: set[str] = set()
    for step in (step for step in after.steps if after.created(step) or not step.writes):
        made_by = (maker.get(after.storage_of(read), "") for read in step.reads)
        out.update(name for name in made_by if name in kernel and kernel.get(step.name) != kernel[name])
    return out


def _span(found: Fused, remake: Remake) -> tuple[str, str]:
    """The span in original steps: from the first member of its first step to the last of its last.

    Not from or to a lifted view, which stands within its kernel there: nothing that looks is served by itself.
    """
    steps, position = found.graph.steps, found.graph.position
    first, last = (position[name] for name in remake.span)
    while first < last and steps[first].name in found.lifted:
        first += 1
    while first < last and steps[last].name in found.lifted:
        last -= 1
    return _first(found, steps[first].name), steps[last].name


def _first(found: Fused, step: str) -> str:
    """The first of its members: before it is before all of them. What is behind the last is behind all, of one name."""
    return found.members[step][0].name if step in found.members else step
