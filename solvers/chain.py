"""Recursion below the sum of the block boundaries: a dynamic program over segments of blocks.

Of a segment only the input of its first block is kept. When the backward reaches the segment, its inner boundaries are
made again in one forward sweep and live until their own block's region is done; what lies inside a block is made again
in passing (and let go), and once more for the block's own region. This is checkpointing of chains at two levels, with
segments of unequal length chosen by the program (after Beaumont et al., "Optimal checkpointing for heterogeneous
chains", arXiv:1911.13214, whose recursion goes deeper). The program works on estimates, region by region; what it
returns is simulated by `edit` and, when that disagrees, asked again with the difference taken off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memopt.edit import Remake
from memopt.plans import Plan, Problem, simulated
from memopt.solvers.blocks import find_blocks
from memopt.solvers.space import Parts, Space
from memopt.solvers.tally import Tally

LEVELS = 6  # plans between one block a segment and the least peak
ASKS = 4  # times the program is asked again after a simulation that disagrees
SLOTS = 4000  # of the budget, to which kept bytes are rounded up
HALVINGS = 12  # of the budget in the search for the floor


@dataclass(frozen=True)
class Links:
    """The chain, in the order of the forward: one link a block with a region.

    region: its number in Space. crossing: values of earlier blocks remade for it. inside: its own values remade for
    it. rest: most bytes while its region runs, without any crossing value. inputs: bytes of `crossing`. sweep: seconds
    of making again, once, what the crossing values of the next link need.
    """

    space: Space
    regions: tuple[int, ...]
    crossing: tuple[tuple[int, ...], ...]
    inside: tuple[frozenset[int], ...]
    rest: tuple[int, ...]
    inputs: tuple[int, ...]
    sweep: tuple[float, ...]
    rebuilt: tuple[frozenset[int], ...]


Segments = tuple[tuple[int, int], ...]  # (first, last) link of each, in the order of the forward


def links_of(problem: Problem, space: Space) -> Links | None:
    """The chain of a problem whose offers lie in the regions of `find_blocks` (as Recompute's do), else None."""
    blocks = find_blocks(problem.graph)
    spans = {span: block for block, span in enumerate(blocks.regions) if span is not None}
    number = {space.number[name]: block for name, block in blocks.of.items()}
    if not space.separable or any((r.first, r.last) not in spans for r in space.regions) or not space.regions:
        return None
    found = sorted((spans[r.first, r.last], k) for k, r in enumerate(space.regions))
    order = tuple(k for _, k in found)
    crossing, inside = [], []
    for block, k in found:
        read = space.regions[k].again
        mine = frozenset(v for v in read if number[v] == block or shared(space, v))
        cross = tuple(sorted(v for v in reached(space, k, mine) if v in space.makers and v not in mine))
        crossing.append(cross)
        inside.append(mine)
    parts = [frozenset[int]()] * len(space.regions)
    for k, mine in zip(order, inside, strict=True):
        parts[k] = mine
    every = {v for cross in crossing for v in cross}
    inputs = tuple(sum(space.size[v] for v in cross) for cross in crossing)
    rebuilt = tuple(
        frozenset(w for v in cross for w in sweep_of(space, v, every) - {v})
        for cross in (*crossing[1:], ())
    )  # fmt: skip
    sweep = tuple(
        sum({space.makers[v].at: space.makers[v].seconds for v in (*made, *cross)}.values())
        for made, cross in zip(rebuilt, (*crossing[1:], ()), strict=True)
    )
    return Links(
        space, order, tuple(crossing), tuple(inside), rest_of(space, tuple(parts), order, every), inputs, sweep, rebuilt
    )


def shared(space: Space, v: int) -> bool:
    """Offered in more regions than its own and its reader's: a table for all layers, remade for each."""
    return sum(v in region.offers for region in space.regions) > 2  # by its own step, whose way bears its number


def reached(space: Space, k: int, mine: frozenset[int]) -> set[int]:
    """Values read in region k by its steps, or by the makers of this block's own values."""
    return {*space.covered_in(k), *(u for v in mine for u in space.makers[v].reads)}


def sweep_of(space: Space, v: int, stop: set[int]) -> set[int]:
    """What making v again needs, down to the boundaries in `stop`."""
    found, stack = {v}, [v]
    while stack:
        for u in space.makers[stack.pop()].reads:
            if u in space.makers and u not in found and u not in stop:
                found.add(u)
                stack.append(u)
    return found


def rest_of(space: Space, parts: Parts, order: Sequence[int], boundaries: set[int]) -> tuple[int, ...]:
    """Most bytes in each region when all inside values are remade, less the boundaries alive at that moment."""
    held, _ = space.bytes_at(parts)
    ends = space.ends(parts)
    kept = sorted(boundaries)
    out = []
    for k in order:
        region = space.regions[k]
        first, last = 2 * region.first, 2 * region.last + 2
        alive = sum(space.size[v] for v in kept if ends[v] >= first)
        out.append(int(held[first:last].max()) - alive)
    return tuple(out)


def segments(links: Links, budget: float) -> Segments | None:
    """Segments with least seconds of sweeps whose estimated bytes hold the budget; None when there are none.

    Labels (bytes of kept inputs, rounded up to a slot; seconds) per link, dominated ones dropped.
    """
    unit = max(1.0, budget / SLOTS)
    count = len(links.regions)
    labels: list[dict[float, tuple[float, Segments]]] = [{} for _ in range(count + 1)]
    labels[0][0] = (0.0, ())
    for first in range(count):
        for kept, (seconds, done) in undominated(labels[first]):
            held, extra = kept + links.inputs[first], 0.0
            inner = 0.0
            for last in range(first, count):
                if last > first:
                    inner += links.inputs[last]
                    extra += links.sweep[last - 1]
                if links.rest[last] + held + inner > budget:
                    break
                slot = math.ceil(held / unit) * unit
                found = labels[last + 1].get(slot)
                if found is None or seconds + extra < found[0]:
                    labels[last + 1][slot] = (seconds + extra, (*done, (first, last)))
    ends = list(labels[count].values())
    return min(ends, key=lambda label: label[0])[1] if ends else None


def undominated(labels: dict[float, tuple[float, Segments]]) -> list[tuple[float, tuple[float, Segments]]]:
    """Labels by kept bytes, those left out that a smaller one undercuts in seconds."""
    out: list[tuple[float, tuple[float, Segments]]] = []
    for kept, label in sorted(labels.items(), key=lambda item: (item[0], item[1][0])):
        if not out or label[0] < out[-1][1][0]:
            out.append((kept, label))
    return out


def remakes_of(problem: Problem, links: Links, chosen: Segments) -> tuple[Remake, ...]:
    """The segments as remakes: offers of the problem, some with their span moved."""
    space, out = links.space, dict[tuple[int, tuple[int, int]], None]()
    for first, last in chosen:
        top = space.regions[links.regions[last]]
        for i in range(first, last + 1):
            own = space.regions[links.regions[i]]
            out.update(dict.fromkeys((v, (own.first, own.last)) for v in sorted(links.inside[i])))
            if i > first:
                out.update(dict.fromkeys((v, (top.first, own.last)) for v in links.crossing[i]))
            if i < last:
                out.update(dict.fromkeys((v, (top.first, top.last)) for v in sorted(links.rebuilt[i])))
    offer = {space.number[r.value]: r for r in problem.remakes if r.repeats}
    steps = problem.graph.steps
    return tuple(replace(offer[v], span=(steps[a].name, steps[b].name)) for v, (a, b) in out)


def lowest(links: Links, top: float) -> tuple[Segments, float]:
    """(the segments of least estimated peak, that peak)."""
    low, best = 0.0, segments(links, top)
    if best is None:
        return tuple((i, i) for i in range(len(links.regions))), top
    for _ in range(HALVINGS):
        middle = (low + top) / 2
        found = segments(links, middle)
        if found is None:
            low = middle
        else:
            best, top = found, middle
    return best, top


def levels(problem: Problem, links: Links, top: float) -> tuple[Plan, ...]:
    """Simulated plans of ever longer segments, from none to the least peak; they do not depend on the budget."""
    alone: Segments = tuple((i, i) for i in range(len(links.regions)))
    least, bottom = lowest(links, top)
    kept = sum(links.inputs)
    upper = max(rest + kept for rest in links.rest)
    targets = [upper - (upper - bottom) * i / LEVELS for i in range(1, LEVELS)]
    found = [alone, *(s for target in targets if (s := segments(links, target)) is not None), least]
    tally = Tally(problem)
    return tuple(tally.plan(remakes_of(problem, links, s), "chain") for s in dict.fromkeys(found))


def chain(problem: Problem) -> Plan:
    """Every value inside a block remade, and as many boundaries as the budget asks. No lower bound (0.0 seconds).

    Raises ValueError when the offers do not lie in disjoint regions.
    """
    space = Space(problem)
    links = links_of(problem, space)
    if links is None:
        raise ValueError("chain needs offers in the regions of the blocks, one a value; greedy takes any")
    least, _ = lowest(links, space.state(space.none()).peak)
    best, target = simulated(problem, remakes_of(problem, links, least), "chain"), float(problem.budget)
    for _ in range(ASKS):
        found = segments(links, target)
        if found is None:
            break
        plan = simulated(problem, remakes_of(problem, links, found), "chain")
        if plan.peak <= problem.budget:
            best = min(best, plan, key=lambda p: (p.peak > problem.budget, p.seconds))
            break
        target -= plan.peak - problem.budget
    return best
