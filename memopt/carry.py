"""The decisions of one plan on another photograph of the same model, whose steps differ a little.

A batch of 1 is traced as a program of its own: what would be copied at any other batch is a view there, and names
shift. Steps are matched by what they are (phase, operation, source line, and the how-manieth of those); values by the
steps that make them; regions by their order. A value that only the other photograph makes is remade in every region
where others are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memopt.edit import Remake
from memopt.graph import StepGraph

Kind = tuple[str, str, str]


def carried(
    here: StepGraph,
    there: StepGraph,
    chosen: Iterable[Remake],
    offers: Sequence[Remake],
    offers_there: Sequence[Remake],
) -> tuple[Remake, ...] | None:
    """The offers of the other photograph that stand for the chosen ones; None if the two have other regions, or a
    plan moves spans away from them."""
    regions, regions_there = (list(dict.fromkeys(r.span for r in some)) for some in (offers, offers_there))
    chosen = tuple(chosen)
    if not chosen:
        return ()
    if len(regions) != len(regions_there) or not {r.span for r in chosen} <= set(regions):
        return None
    span = dict(zip(regions, regions_there, strict=True))
    value = matched_storages(here, there)
    wanted = {(value[r.value], span[r.span]) for r in chosen if r.value in value}
    known, open_spans = set(value.values()), {span[r.span] for r in chosen}
    return tuple(
        offer
        for offer in offers_there
        if (offer.value, offer.span) in wanted or (offer.value not in known and offer.span in open_spans)
    )


def matched_storages(here: StepGraph, there: StepGraph) -> dict[str, str]:
    """Storage -> its counterpart, for those made by steps of which both photographs have equally many of a kind."""
    ours, theirs = _by_kind(here), _by_kind(there)
    pairs = {name: name for name in here.input_storages if name in there.storages}
    for kind, steps in ours.items():
        others = theirs.get(kind, ())
        if len(steps) == len(others):
            for one, other in zip(steps, others, strict=True):
                pairs.update(zip(here.created(here.steps[one]), there.created(there.steps[other]), strict=False))
    return pairs


def _by_kind(graph: StepGraph) -> dict[Kind, list[int]]:
    found: dict[Kind, list[int]] = {}
    for at, step in enumerate(graph.steps):
        found.setdefault((step.phase, step.op, step.source), []).append(at)
    return found
