"""Forward steps that need not run: where copies replace them, and where nobody reads what they make."""

from __future__ import annotations

from memopt.edit import live_steps
from memopt.solvers.space import Space


def droppable(space: Space) -> list[int]:
    """Makers that no forward step needs unless it can itself be dropped, so that copies may replace them."""
    graph = space.graph
    makers = {m.at for m in space.makers.values() if not m.unpacks}
    needed: set[str] = set(graph.outputs)
    spare: list[int] = []
    inside = {at: region.values for region in space.regions for at in range(region.first, region.last + 1)}
    for at in reversed(range(len(graph.steps))):
        step = graph.steps[at]
        spared = step.pure and not step.advances and step.writes and at not in inside
        free = spared and not any(w in needed for w in step.writes)
        if free and at in makers:
            spare.append(at)
        if not free:
            offered = inside.get(at, {})
            needed.update(r for r in step.reads if space.number[graph.storage_of(r)] not in offered)
    return sorted(spare)


def dead_seconds(space: Space) -> float:
    """Seconds of steps nobody reads even before any edit; `edit` drops them too."""
    alive = {step.name for step in live_steps(space.graph.steps, space.graph.outputs)}
    seconds = space.problem.seconds
    return sum(seconds.get(step.name, 0.0) for step in space.graph.steps if step.name not in alive)
