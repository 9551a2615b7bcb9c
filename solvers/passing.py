"""Segments of the chain whose insides are kept as they are made again: one more forward of the segment, and no more.

`memopt.solvers.chain` lets go of what lies inside a block in passing and makes it once more for the block's own region:
least bytes, and nearly twice the seconds. Here the whole segment is made again when the backward reaches it, and held
until each block's region is done (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174). What
the last block of all reads is at hand when the backward begins, so nothing of it is made again.
"""

from __future__ import annotations

from dataclasses import replace

from memopt.edit import Remake
from memopt.plans import Plan, Problem
from memopt.solvers.chain import Links, Segments
from memopt.solvers.tally import Tally

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # blocks a segment
FEW, MANY = 3, 2_000  # lengths that are simulated of a step with more offers than that; all of them of another


def uniform(count: int, length: int) -> Segments:
    """Segments of `length` links; the first takes what is left over, as it is the last that the backward reaches."""
    ends = range(count - 1, -1, -length)
    return tuple((max(0, end - length + 1), end) for end in reversed(ends))


def estimate(links: Links, chosen: Segments) -> int:
    """Bytes of kept inputs and of the segment that holds most while it is made again."""
    size = links.space.size
    inside = [sum(size[v] for v in mine) for mine in links.inside]
    held = (sum(inside[a : b + 1]) + sum(links.inputs[a + 1 : b + 1]) for a, b in chosen)
    return sum(links.inputs[a] for a, _ in chosen) + max(held)


def remakes_in_passing(problem: Problem, links: Links, chosen: Segments) -> tuple[Remake, ...]:
    """The segments as remakes: every value of a segment once, from the segment's first late read to its own region."""
    space, until = links.space, dict[tuple[int, int], int]()  # (first late read, value) -> last late read
    final = len(links.regions) - 1
    for first, last in chosen:
        top = space.regions[links.regions[last]].first
        for at in range(first, last + 1):
            inside = sorted(links.inside[at]) if at != final else []
            for v in (*inside, *(links.crossing[at] if at > first else ())):
                until[top, v] = max(until.get((top, v), 0), space.regions[links.regions[at]].last)
    offer = {space.number[r.value]: r for r in problem.remakes if r.repeats}
    steps = problem.graph.steps
    return tuple(replace(offer[v], span=(steps[a].name, steps[b].name)) for (a, v), b in until.items())


def in_passing(problem: Problem, links: Links) -> tuple[Plan, ...]:
    """Simulated plans of equal segments, those of least estimated bytes first; they do not depend on the budget."""
    count, most = len(links.regions), FEW if len(problem.remakes) > MANY else len(LENGTHS)
    found = [uniform(count, length) for length in LENGTHS if length <= count]
    found.sort(key=lambda chosen: estimate(links, chosen))
    tally = Tally(problem)
    return tuple(tally.plan(remakes_in_passing(problem, links, s), "segments") for s in found[:most])
