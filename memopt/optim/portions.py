"""An optimizer's step over some of its parameters at a time: the same class, the same arithmetic, fewer temporaries.

Where no update depends on another parameter's, the portions give the bits of the whole step: a foreach operation treats
each tensor of its list by itself. Adam over a list of all parameters makes temporaries of their size; over a portion,
of the portion's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.optim.family import Family
from memopt.optim.sharded import Sharded

# The very classes, no subclass: what those do is not known. LBFGS and SparseAdam are none (memopt.optim.rebuild).
SEPARATE = frozenset({
    *(torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW),
    *(torch.optim.Adamax, torch.optim.ASGD, torch.optim.Muon, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD),
})  # fmt: skip


@dataclass(frozen=True)
class Update:
    """How a planned step updates. portion: bytes of parameters to update together, at most (one parameter at least);
    None: all at once, as the optimizer does. in_backward: names of parameters updated as soon as their gradient is
    final. state: how the moments are stored instead, a name of memopt/optim/precision.py; "": as they are."""

    portion: int | None = None
    in_backward: frozenset[str] = frozenset()
    state: str = ""


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


def portions_of(optimizer: Optimizer, portion: int | None, alone: frozenset[int]) -> Iterator[list[Tensor]]:
    """The parameters that have a gradient, in order, by portions of so many bytes. alone: ids of those that make a
    portion by themselves."""
    found: list[Tensor] = []
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if id(p) in alone:
            yield [p]
            continue
        if found and portion is not None and nbytes(found) + nbytes([p]) > portion:
            yield found
            found = []
        found.append(p)
    if found:
        yield found


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of their elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
