"""Copies elsewhere that go on while the step computes: their steps, and the seconds of a step that has some.

An offload's copy out is two steps, `start` behind the value and `drain` where it is waited for; its copy in is `fetch`
and, before the first read, `arrive`. All of them name the memory that is being copied, so the timeline counts it for as
long as a copy needs it, as it counts everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from memopt.edit import DISK, HOST, TOKEN, Remake
from memopt.graph import Step

START, DRAIN, FETCH, ARRIVE = COPYING = tuple(f"memopt.{kind}_" for kind in ("start", "drain", "fetch", "arrive"))
STATE = "_state.default"  # how operations end that move an optimizer's state (memopt/optim/moved.py)
OVERLAP = "overlap"  # its name among the passes, to switch it off
MOVE = "move_gradient"  # puts a final gradient where it lies until the update (memopt/compose.py)
PACK, UNPACK = "memopt.pack_", "memopt.unpack_"


def tried_as(op: str) -> str:
    """The operation whose run tells what this one holds inside itself; "" for a wait or a copy back, which hold nothing
    and for which nothing lies in a pool: as nobody began the copy, they cannot be run alone."""
    if op.startswith(COPYING):
        return op.replace(START, PACK) if op.startswith(START) and not op.endswith(STATE) else ""
    return op


def moves(remake: Remake) -> bool:
    """Whether it keeps its value elsewhere, or a part, there and back by copies that may go on beside other steps."""
    return any(resource in (DISK, HOST) for resource, _ in remake.takes)


def overlapped(remake: Remake, drained: str, fetched: str) -> Remake:
    """The same move with its copies under way while steps run: out until that step has run, in from before that one.

    What stays of a part is copied by what computes: the two waits have seconds of their own (memopt/prices.py).

    drained: a forward step of the same program, the value's maker or later; fetched: a backward one, not after the
    first read. Copies that already are under way get other moments.
    """
    if remake.drained:
        return replace(remake, drained=drained, fetched=fetched)
    (start,), (back,) = remake.pack, remake.unpack
    ((info, storage),) = remake.made
    (landed, arrived), token = waits_of(remake), replace(info, shape=(TOKEN,))
    drain = replace(start, name=landed, op=start.op.replace(PACK, DRAIN), reads=(remake.value, info.name),
                    writes=(landed,), key=f"drain_{start.key}")  # fmt: skip
    arrive = replace(back, name=arrived, op=back.op.replace(UNPACK, ARRIVE), reads=(remake.value,),
                     writes=(), key=f"arrive_{back.key}", pure=False)  # fmt: skip
    return replace(
        remake,
        pack=(replace(start, op=start.op.replace(PACK, START)), drain),
        unpack=(replace(back, op=back.op.replace(UNPACK, FETCH), reads=(landed,)), arrive),
        made=(
            (token, replace(storage, nbytes=TOKEN)),
            (replace(info, name=landed, storage=landed), replace(storage, name=landed)),
        ),
        drained=drained,
        fetched=fetched,
    )


def waits_of(remake: Remake) -> tuple[str, str]:
    """Names of the two waits that the move has once it is `overlapped`, for its copy out and in."""
    return f"{remake.pack[0].writes[0]}_landed", f"{remake.unpack[0].name}_arrived"


def spent(steps: Iterable[Step], seconds: Callable[[Step], float]) -> Iterator[tuple[Step, float]]:
    """Each step with the seconds it adds to the whole, on three resources: what computes, and one link each way, which
    takes copies in turn.

    seconds: of a step alone; of `start` and `fetch` those of the copy on its link, which cost the step nothing. A wait
    lasts until its copy has ended, and then its own seconds. Assumes that copies slow nothing else.
    """
    clock, free, ends = 0.0, {START: 0.0, FETCH: 0.0}, dict[str, float]()
    for step in steps:
        if not step.op.startswith(COPYING):
            cost = seconds(step)
        elif (kind := next((kind for kind in free if step.op.startswith(kind)), None)) is not None:
            free[kind] = ends[step.writes[0]] = max(free[kind], clock) + seconds(step)
            cost = 0.0
        else:
            ended = next(ends[name] for name in reversed(step.reads) if name in ends)  # others only end with it
            cost = max(0.0, ended - clock) + seconds(step)
        clock += cost
        yield step, cost


def elapsed(steps: Iterable[Step], seconds: Callable[[Step], float]) -> float:
    """Seconds of all the steps, as `spent` has them."""
    return sum(cost for _, cost in spent(steps, seconds))
