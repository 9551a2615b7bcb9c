"""ROTOR: the optimal persistent schedule of a chain by dynamic programming.

Beaumont et al., "Optimal checkpointing for heterogeneous chains", arXiv:1911.13214: C(s, t, m) is the least time of
forward and backward of stages s to t with m slots besides the input of s. Either stage s keeps all it saves (F_all),
or its input is a checkpoint: forwards pass to some stage k > s whose input is kept, k to t are done, then s to k - 1
from the checkpoint. Exact for the chain in 500 slots, persistent (a checkpoint stays until it is used up); the step
graph is only nearly a chain, so the answer is simulated and asked for again (answer.settled).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.planners.answer import Answer, settled
from benchmarks.planners.export import Work
from benchmarks.planners.schedule import Schedule
from benchmarks.planners.stages import Chain, chain_of, resident, schedule_of

SLOTS = 500
KEEP = -1  # the choice to keep all the first stage saves; else: the stage the forwards pass to
NEVER = -2


@dataclass(frozen=True)
class Slots:
    """The chain's figures, bytes as slots (rounded up). given[i]: what stage i hands on."""

    forward: list[float]
    backward: list[float]
    given: list[int]
    saved: list[int]
    passing: list[int]
    keeping: list[int]
    late: list[int]
    start: list[int]


@dataclass(frozen=True)
class Table:
    """time[s, t, m]: least seconds, inf where nothing fits; choice[s, t, m]: how."""

    time: NDArray[np.float64]
    choice: NDArray[np.int32]


def rotor(work: Work, budget: int) -> Answer:
    """The best persistent schedule of the chain within the budget."""
    chain = chain_of(work)
    return Answer(settled(work, budget, lambda target: planned(chain, target)))


def planned(chain: Chain, budget: float) -> Schedule | None:
    """One run of the program; None if the chain does not fit."""
    room = budget - resident(chain) - chain.bytes_of(chain.fixed)
    if room <= 0:
        return None
    slots, last = slots_of(chain, room / SLOTS), len(chain.stages) - 1
    table = fill(slots, SLOTS)
    if not np.isfinite(table.time[0, last, SLOTS]):
        return None
    return schedule_of(chain, tuple(names(chain, operations(table, slots, 0, last, SLOTS))))


def slots_of(chain: Chain, unit: float) -> Slots:
    """The chain measured in slots of `unit` bytes."""
    count, sizes = range(len(chain.stages)), chain.sizes

    def slots(values: Iterator[int]) -> list[int]:
        return [math.ceil(value / unit) for value in values]

    return Slots(
        [chain.seconds(chain.forward(at)) for at in count],
        [chain.seconds(chain.backward(at)) for at in count],
        slots(chain.bytes_of(chain.crossing(at)) for at in count),
        slots(chain.bytes_of(chain.saved(at)) for at in count),
        slots(size.passing for size in sizes),
        slots(size.keeping for size in sizes),
        slots(size.late for size in sizes),
        slots(size.start for size in sizes),
    )


def fill(of: Slots, slots: int) -> Table:
    """The whole table, shorter stretches first."""
    count = len(of.forward)
    table = Table(np.full((count, count, slots + 1), np.inf), np.full((count, count, slots + 1), NEVER, np.int32))
    for length in range(count):
        for s in range(count - length):
            stretch(table, of, s, s + length)
    return table


def stretch(table: Table, of: Slots, s: int, t: int) -> None:
    """The entries of stages s to t: keep all of s, or pass to each k in turn."""
    best, how = table.time[s, t], table.choice[s, t]
    needs = max(of.start[t] + of.keeping[s], of.saved[s] + of.late[s], 0)
    rest = shifted(table.time[s + 1, t], of.saved[s]) if s < t else np.zeros_like(best)
    offer(best, how, of.forward[s] + rest + of.backward[s], needs, KEEP)
    needs, passed = 0, 0.0
    for k in range(s + 1, t + 1):
        passed += of.forward[k - 1]
        needs = max(needs, of.start[t] + of.passing[k - 1] + (of.given[k - 2] if k - 1 > s else 0))
        time = passed + shifted(table.time[k, t], of.given[k - 1]) + table.time[s, k - 1]
        offer(best, how, time, needs, k)


def offer(best: NDArray[np.float64], how: NDArray[np.int32], time: NDArray[np.float64], needs: int, name: int) -> None:
    """Take `time` where it is better and at least `needs` slots are free."""
    better = time < best
    better[: max(needs, 0)] = False
    best[better], how[better] = time[better], name


def shifted(values: NDArray[np.float64], by: int) -> NDArray[np.float64]:
    """values[m - by] at m; inf where m < by."""
    if by <= 0:
        return values
    out = np.full_like(values, np.inf)
    out[by:] = values[: max(len(values) - by, 0)]
    return out


def operations(table: Table, of: Slots, s: int, t: int, m: int) -> Iterator[tuple[str, int]]:
    """("F", stage) and ("B", stage) in order."""
    k = int(table.choice[s, t, m])
    if k == KEEP:
        yield "F", s
        if s < t:
            yield from operations(table, of, s + 1, t, m - of.saved[s])
        yield "B", s
        return
    yield from (("F", at) for at in range(s, k))
    yield from operations(table, of, k, t, m - of.given[k - 1])
    yield from operations(table, of, s, k - 1, m)


def names(chain: Chain, done: Iterator[tuple[str, int]]) -> Iterator[str]:
    """Step names of the operations; a forward's second run leaves out what must run once."""
    seen: set[int] = set()
    for kind, at in done:
        if kind == "B":
            yield from (step.name for step in chain.backward(at))
        elif at in seen:
            yield from chain.again(at)
        else:
            seen.add(at)
            yield from (step.name for step in chain.forward(at))
