"""Bytes over time: what a step graph holds while each of its steps runs.

The unit is the storage. A step has three moments: allocate outputs and workspace, run, free what is used for the
last time. Estimators that merge the first and the last miss the peak (design: docs/notes/001-memory-model.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memopt.graph import PHASES, Step, StepGraph


def rounded(nbytes: int, block: int) -> int:
    """Bytes an allocator gives for `nbytes` when it rounds up to whole blocks."""
    return -(-nbytes // block) * block


def lifetimes(graph: StepGraph) -> dict[str, tuple[int, int]]:
    """Storage -> (position that allocates it, position after which it is free). Inputs begin at -1.

    What the caller holds (inputs and outputs) ends at len(steps). What a fused step makes begins after it, in the
    place of what it read last; what it makes for nobody is left out. So is what is inlined in its readers: what it is
    made of lives until the last of them.
    """
    end = len(graph.steps)
    spans = {name: (-1, end) for name in graph.input_storages}
    for name, uses in graph.uses.items():
        born = uses[0] + graph.steps[uses[0]].fused
        if name not in spans and born <= uses[-1]:
            spans[name] = (born, uses[-1])
    for name in graph.output_storages:
        spans[name] = (spans[name][0] if name in spans else graph.uses[name][0], end)
    for step in graph.steps:
        if step.inlined and (last := vanishing(graph, step)):
            for name in graph.created(step):
                del spans[name]
            for name in {graph.storage_of(read) for read in step.reads}:
                spans[name] = (spans[name][0], max(spans[name][1], last))
    return spans


def vanishing(graph: StepGraph, step: Step) -> int:
    """Position of the last step that reads what this one makes, if all that read it are fused; else 0: it is stored."""
    uses = [at for name in graph.created(step) for at in graph.uses[name][1:]]
    readers = [at for at in uses if at not in graph.viewing]
    return max(uses) if readers and all(graph.steps[at].fused for at in readers) else 0


def timeline(graph: StepGraph, block: int = 1) -> tuple[int, ...]:
    """Bytes held while each step runs, one entry a step: what lives before it, its outputs, its workspace.

    block: bytes a storage is rounded up to; 512 on CUDA (kMinBlockSize, c10/core/AllocatorConfig.h), 1 on CPU.
    Views share a storage, counted once. Leaves out fragmentation.
    """
    delta = [0] * (len(graph.steps) + 2)
    for name, (born, dead) in lifetimes(graph).items():
        size = rounded(graph.storages[name].nbytes, block)
        delta[born + 1] += size
        if dead + 1 < len(delta) - 1:
            delta[dead + 2] -= size
    held, out = delta[0], []
    for at, step in enumerate(graph.steps):
        held += delta[at + 1]
        out.append(held + rounded(step.workspace, block))
    return tuple(out)


def live_after(graph: StepGraph, block: int = 1) -> tuple[int, ...]:
    """Bytes still held once each step has run and let go of what it read for the last time: before the next one.

    block: as of `timeline`.
    """
    delta = [0] * (len(graph.steps) + 1)
    for name, (born, dead) in lifetimes(graph).items():
        size = rounded(graph.storages[name].nbytes, block)
        made = born if born < 0 else graph.uses[name][0]  # not after it, as what is in the place of another is
        delta[max(made, 0)] += size
        delta[dead] -= size
    held, out = 0, []
    for change in delta[: len(graph.steps)]:
        held += change
        out.append(held)
    return tuple(out)


def peak(graph: StepGraph, block: int = 1) -> int:
    """Largest entry of the timeline, bytes; what the inputs hold if there is no step."""
    resident = sum(rounded(graph.storages[name].nbytes, block) for name in graph.input_storages)
    return max(timeline(graph, block), default=resident)


def least_peak(graph: StepGraph, movable: frozenset[str], block: int = 1) -> int:
    """Bytes that no plan comes below which lets go of these storages alone: at each step, what else lives there, what
    the step makes, and its workspace. A fused step makes nothing beside what it reads, which may be packed in it."""
    fixed = [0] * (len(graph.steps) + 2)
    size = {name: rounded(storage.nbytes, block) for name, storage in graph.storages.items()}
    for name, (born, dead) in lifetimes(graph).items():
        if name not in movable:
            fixed[born + 1] += size[name]
            fixed[min(dead, len(graph.steps)) + 1] -= size[name]
    held, least = fixed[0], 0
    for at, step in enumerate(graph.steps):
        held += fixed[at + 1]
        own = set() if step.fused else {graph.storage_of(name) for name in step.writes} & movable
        least = max(least, held + sum(size[name] for name in own) + rounded(step.workspace, block))
    return least


LASTING = ("parameter", "buffer", "state", "gradient")  # kinds of storages that activations are not


def lasting(graph: StepGraph, kinds: Sequence[str] = LASTING) -> int:
    """Bytes of these kinds as backward ends: by default, all that smaller inputs leave as they are."""
    last = max((at for at, step in enumerate(graph.steps) if step.phase == "backward"), default=-1)
    spans = lifetimes(graph)
    alive = (name for name, (born, dead) in spans.items() if born <= last <= dead)
    return sum(graph.storages[name].nbytes for name in alive if graph.storages[name].kind in kinds)


def phase_peaks(graph: StepGraph, block: int = 1) -> dict[str, int]:
    """Peak bytes of each phase that has steps, in order."""
    bytes_at = timeline(graph, block)
    return {
        phase: max(held for held, step in zip(bytes_at, graph.steps, strict=True) if step.phase == phase)
        for phase in PHASES
        if any(step.phase == phase for step in graph.steps)
    }


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is held while the step at `position` runs: storages largest first, workspace apart. Bytes."""

    position: int
    bytes: int
    workspace: int
    storages: tuple[tuple[str, int], ...]


def at_peak(graph: StepGraph, block: int = 1) -> Snapshot:
    """The first moment of the peak, and every storage alive in it."""
    bytes_at = timeline(graph, block)
    at = max(range(len(bytes_at)), key=bytes_at.__getitem__)
    alive = [
        (name, rounded(graph.storages[name].nbytes, block))
        for name, (born, dead) in lifetimes(graph).items()
        if born <= at <= dead
    ]
    alive.sort(key=lambda item: (-item[1], item[0]))
    return Snapshot(at, bytes_at[at], rounded(graph.steps[at].workspace, block), tuple(alive))


def by_kind(graph: StepGraph, snapshot: Snapshot) -> dict[str, int]:
    """The snapshot's bytes by storage kind, workspace under 'workspace', largest first; empty kinds left out."""
    sums: dict[str, int] = {"workspace": snapshot.workspace}
    for name, size in snapshot.storages:
        kind = graph.storages[name].kind
        sums[kind] = sums.get(kind, 0) + size
    return {kind: size for kind, size in sorted(sums.items(), key=lambda item: (-item[1], item[0])) if size}
