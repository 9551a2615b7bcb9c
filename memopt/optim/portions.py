"""An optimizer's step over some of its parameters at a time: the same class, the same arithmetic, fewer temporaries.

Where no update depends on another parameter's, the portions give the bits of the whole step: a foreach operation treats
each tensor of its list by itself. Adam over a list of all parameters makes temporaries of their size; over a portion,
of the portion's. A parameter larger than a portion is updated in pieces where that is known to change no bit
(memopt/optim/alone.py), and one whose state lies elsewhere by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.local import local
from memopt.optim.alone import Away, parts_of, piece, update_alone
from memopt.optim.coded import coded_of
from memopt.optim.family import Family, plain_step
from memopt.optim.moved import Ferry, State
from memopt.optim.sharded import Sharded

# The very classes, no subclass: what those do is not known. LBFGS and SparseAdam are none (memopt.optim.rebuild).
SEPARATE = frozenset({
    *(torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW),
    *(torch.optim.Adamax, torch.optim.ASGD, torch.optim.Muon, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD),
})  # fmt: skip


@dataclass(frozen=True)
class Update:
    """How a planned step updates. portion: bytes of parameters to update together, at most (one parameter, or piece of
    one, at least); None: all at once, as the optimizer does. in_backward: names of parameters updated as soon as their
    gradient is final. state: how the moments are stored instead, a name of memopt/optim/precision.py; "": as they are.
    moved: names of parameters whose state lies in this codec's pool but for its update; gradients: of those whose
    gradients lie there from when they are final; both take `there` bytes. order: those of in_backward as they come in
    the backward, where that is known."""

    portion: int | None = None
    in_backward: frozenset[str] = frozenset()
    state: str = ""
    moved: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    pool: str = ""
    there: int = 0
    order: tuple[str, ...] = ()


def separate(optimizer: Optimizer | None) -> bool:
    """Whether each parameter's update is known to depend on no other parameter."""
    if isinstance(optimizer, Sharded):
        return optimizer.max_norm is None
    return optimizer is not None and (type(optimizer) in SEPARATE or isinstance(optimizer, Family))


def part_of(optimizer: Optimizer, params: Sequence[Tensor]) -> Optimizer:
    """The optimizer over these of its parameters. State is shared, hooks are left to the optimizer itself."""
    wanted = {id(p) for p in params}
    part: Optimizer = object.__new__(type(optimizer))
    shared = {key: value for key, value in vars(optimizer).items() if key != "step"}
    hooks: dict[str, Any] = {key: OrderedDict() for key in shared if key.endswith("_hooks")}
    groups = [{**group, "params": [p for p in group["params"] if id(p) in wanted]} for group in optimizer.param_groups]
    vars(part).update(shared, **hooks, param_groups=[group for group in groups if group["params"]])
    return part


def portions_of(optimizer: Optimizer, portion: int | None, alone: Collection[int]) -> Iterator[list[Tensor]]:
    """The parameters that have a gradient, in order, by portions of so many bytes. alone: ids of those that make a
    portion by themselves, as the coded ones do."""
    found: list[Tensor] = []
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if id(p) in alone or coded_of(p) is not None:
            yield [p]
            continue
        if found and portion is not None and nbytes(found) + nbytes([p]) > portion:
            yield found
            found = []
        found.append(p)
    if found:
        yield found


def update_portion(
    optimizer: Optimizer, params: Sequence[Tensor], portion: int | None, homes: Mapping[int, State], kind: str,
    ferry: Ferry, later: Tensor | None = None,
) -> None:  # fmt: skip
    """Update these parameters together, or the one there is by itself. homes: of states that lie elsewhere, by id; the
    ferry brings them. kind: of the device. later: the parameter that is updated next, if its state may come already."""
    each = piece(optimizer, portion, params[0], kind) if len(params) == 1 else None
    if id(params[0]) in homes:
        first = None
        if later is not None and id(later) in homes:
            first = later, homes[id(later)], parts_of(later, piece(optimizer, portion, later, kind))[0]
        update_alone(optimizer, params[0], each, Away(homes[id(params[0])], ferry, first))
    elif each is not None or coded_of(params[0]) is not None:
        update_alone(optimizer, params[0], each, None)
    else:
        plain_step(part_of(optimizer, params))


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of their elements, of those that are here."""
    return sum(local(tensor).nbytes for tensor in tensors)
