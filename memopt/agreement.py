"""One plan for all ranks: the first one makes it, the others take it over, and each tells what it decided.

A plan that a rank made by itself would follow the prices it measured, and ranks whose steps differ wait for each other
at different collectives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from memopt.errors import MemoptError
from memopt.optim.sharded import Sharded
from memopt.planfile import PlanFile, dumps, loads, to_plan_file
from memopt.planned import Planned

Make = Callable[[PlanFile | None], Planned]


def agreed(group: Any, optimizer: Optimizer | None, given: PlanFile | None, make: Make) -> Planned:
    """The plan that `make` makes on the first rank, on every rank; by itself where there are no others.

    group: of the ranks; None where there are no others. given: a saved plan to go by; make: plans by a saved plan, or
    anew. Every rank must ask for the same step. Raises on every rank what planning raised on the first, and MemoptError
    where a rank cannot take its plan over.
    """
    if group is None:
        return make(given)
    first = dist.get_rank(group) == 0
    made, told = _attempt(lambda: make(given)) if first else (None, None)
    text, count = _heard(told, group)
    if isinstance(optimizer, Sharded):
        optimizer.share(count)
    if not first:
        made, told = _attempt(lambda: make(loads(text, "the plan of rank 0")))
    _compare(made, told, group)
    assert made is not None
    return made


def together(optimizer: Optimizer | None) -> Any:
    """The process group of the ranks that take part in its steps; None if no other does."""
    return optimizer.group if isinstance(optimizer, Sharded) and not optimizer.alone else None


def _attempt(make: Callable[[], Planned]) -> tuple[Planned | None, Any]:
    """The plan, and its file's text and shards; or None and why there is none."""
    try:
        made = make()
        return made, (dumps(to_plan_file(made.result)), made.shards)
    except MemoptError as error:
        return None, error


def _heard(told: Any, group: Any) -> tuple[str, int]:
    """What the first rank tells. Raises, here too, what planning raised there."""
    # Errors that take further arguments do not pickle: their class, words and figures do.
    refused = (type(told), str(told), {**vars(told)}) if isinstance(told, MemoptError) else None
    said: list[Any] = [None if refused else told, refused]
    dist.broadcast_object_list(said, group=group, group_src=0)
    (text, count), refused = said[0] or ("", 0), said[1]
    if refused:
        kind, words, figures = refused
        error: MemoptError = kind.__new__(kind, words)
        error.__dict__.update(figures)
        raise error
    return text, count


def _compare(made: Planned | None, told: Any, group: Any) -> None:
    """Raise MemoptError unless every rank decided the same."""
    mine = f"{type(told).__name__}: {told}" if made is None else decisions(made)
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    if len({*every}) > 1:
        other = next(rank for rank, said in enumerate(every) if said != every[0])
        raise MemoptError(
            f"rank {other} cannot run the plan of rank 0 ({every[other]} there, {every[0]} here): all ranks need the "
            "same model, shapes, options and versions"
        )


def decisions(planned: Planned) -> str:
    """A hash of what the plan has run: where values are made again, and how parameters are updated."""
    update = planned.update
    chosen = [(r.trade, r.value, r.span, r.drained, r.fetched) for r in planned.result.plan.chosen]
    told = (planned.lowering, sorted(planned.left_out), planned.chunks, planned.shards, sorted(chosen), update.state)
    names = (update.in_backward, update.moved, update.gradients)
    return hashlib.sha256(repr((*told, *map(sorted, names))).encode()).hexdigest()[:16]
