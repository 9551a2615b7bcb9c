"""One parameter's update by itself: in pieces, its state fetched from where it lies and stored there again.

In goes a parameter with its gradient; out come the parameter and its state as the optimizer's own step leaves them.

An elementwise update of some elements is that of the whole parameter for these elements, to the bit. On a CPU that
holds for fp32 and wider only: torch adds 16-bit numbers that fill no whole vector with another rounding, and where
those are depends on where a tensor ends and on the number of threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.local import apart
from memopt.optim.adamw import AdamW, AdamW4bit, AdamW8bit, AdamWBf16
from memopt.optim.coded import coded_of, write_back
from memopt.optim.family import Family, dense, in_order, plain_step, portions
from memopt.optim.moved import LEAST, Ferry, State
from memopt.optim.stored import flat

# Their update of an element depends on that element's own past alone; the very classes, as in memopt/optim/portions.py.
ELEMENTWISE = frozenset({
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax),
    *(torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD),
})  # fmt: skip
# Or on its block's: such a state is of the same bytes at every update, so it can lie elsewhere, or with other ranks.
BLOCKWISE = ELEMENTWISE | {AdamW, AdamWBf16, AdamW8bit, AdamW4bit}
PIECES = 32  # of the largest parameter: finer ones save little, and each is a round of kernels
Elements = tuple[Tensor, State, slice | None]  # of a parameter, with its homes; None: all of them
ALIGNED = 4096  # elements a piece is a multiple of: vectors and threads begin where they would in the whole


def piece(optimizer: Optimizer, portion: int | None, p: Tensor, kind: str) -> int | None:
    """Elements of a parameter to update at a time, for portions of so many bytes; None: all of it. kind: of the device
    that updates it, which is not the one that a fake parameter is on."""
    if portion is None or p.numel() <= ALIGNED or p.numel() * p.element_size() <= portion:
        return None
    if not cuttable(optimizer, p, kind):
        return None
    largest = max(each.numel() for group in optimizer.param_groups for each in group["params"])
    least = max(LEAST, -(-largest // PIECES))
    coded, elements = coded_of(p), max(portion // p.element_size(), least)
    whole = ALIGNED if coded is None else coded.page  # both are powers of two
    elements = -(-elements // whole) * whole
    return elements if elements < p.numel() else None


def cuttable(optimizer: Optimizer, p: Tensor, kind: str) -> bool:
    """Whether updates of parts of this parameter are known to be that of the whole, to the bit."""
    if apart(p):
        return False
    group, filled = group_of(optimizer, p), coded_of(p) is not None or dense(p)
    if type(optimizer) is AdamW:  # computes in fp32 whatever the parameter
        return bool(group["state"] == "fp32") and filled
    wide = kind != "cpu" or p.element_size() >= torch.float32.itemsize
    plain = p.is_floating_point() and filled and not (p.grad is not None and p.grad.is_sparse)
    return type(optimizer) in ELEMENTWISE and wide and plain and not group.get("fused")


def group_of(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    """The group of this parameter."""
    return next(group for group in optimizer.param_groups if any(each is p for each in group["params"]))


@dataclass
class Away:
    """A parameter's state that lies in `homes`. next: the parameter that is updated after it, with the elements that
    are first, if its state is away too; following: what comes after the elements that are updated now."""

    homes: State
    ferry: Ferry
    next: Elements | None = None
    following: Elements | None = None

    def brought(self, optimizer: Optimizer, p: Tensor, state: Mapping[str, Any], part: slice | None) -> State:
        """What these elements' update reads of it; what the following one reads is on its way by then."""
        found = self.ferry.take(p, state, self.homes, part)
        if self.following is not None:
            other, homes, elements = self.following
            self.ferry.depart(other, optimizer.state.get(other, {}), homes, elements)
        self.ferry.land(found)
        return found


def parts_of(p: Tensor, each: int | None) -> list[slice | None]:
    """Its elements, so many at a time, or as a whole."""
    return [None] if each is None else [*portions(p.numel(), each)]


def update_alone(optimizer: Optimizer, p: Tensor, each: int | None, away: Away | None) -> None:
    """Update this parameter, `each` elements at a time (None: all). away: if its state does not lie beside it."""
    assert p.grad is not None
    gradient = p.grad
    if coded_of(p) is not None:  # a contiguous weight
        gradient = gradient.contiguous() if each is None else gradient.reshape(-1)
    elif each is not None:
        gradient = in_order(gradient, p)
    elif away is not None and gradient.stride() != p.stride():  # some states are made as the gradient is
        gradient = torch.empty_like(p).copy_(gradient)
    new: dict[str, Any] = {}
    parts = parts_of(p, each)
    for part, after in zip_longest(parts, parts[1:]):
        if away is not None:
            away.following = (p, away.homes, after) if after is not None else away.next
        _update_part(optimizer, p, part, gradient if part is None else gradient[part], away, new)
    state = optimizer.state[p]
    for key, value in new.items():
        if isinstance(value, Tensor) and value.dim() == 0 and key in state:
            state[key].copy_(value)  # the very tensor, as a whole update leaves it
        else:
            state[key] = value


def _update_part(
    optimizer: Optimizer, p: Tensor, part: slice | None, gradient: Tensor, away: Away | None, new: dict[str, Any]
) -> None:
    """Update some elements; what the state of all is after that comes into `new`. What it fetched ends with it."""
    state, coded = optimizer.state.get(p, {}), coded_of(p)
    if coded is not None:
        some = coded.read(p, part, coded.width(optimizer))
    else:
        some = p if part is None else flat(p.detach())[part]
    brought = {} if away is None else away.brought(optimizer, p, state, part)
    own = {key: _taken(value, part, brought.get(key)) for key, value in state.items()}
    twin = _over(optimizer, group_of(optimizer, p), some, own)
    _step(twin, some, gradient)
    if coded is not None:
        write_back(p, coded, part, some)
    for key, value in twin.state[some].items():
        new[key] = _given(key, value, own.get(key), part, p, new, state, away)
    if away is not None:
        at, moved = 0 if part is None else part.start, twin.state[some]
        away.ferry.give([(home, flat(moved[key]), at) for key, home in away.homes.items() if key in moved])


@torch.no_grad()
def _step(optimizer: Optimizer, p: Tensor, gradient: Tensor) -> None:
    """Update the one parameter, which may be of another type than its gradient."""
    if isinstance(optimizer, Family) and type(optimizer).step is Family.step:
        optimizer.update_one(p, gradient, optimizer.param_groups[0])
    else:
        p.grad = gradient if gradient.dtype == p.dtype else gradient.to(p.dtype)
        plain_step(optimizer)


def _over(optimizer: Optimizer, group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> Optimizer:
    """The optimizer over one tensor with this state."""
    twin: Optimizer = object.__new__(type(optimizer))
    shared = {key: value for key, value in vars(optimizer).items() if key != "step" and not key.endswith("_hooks")}
    every: defaultdict[Tensor, Any] = defaultdict(dict, {p: dict(state)} if state else {})
    vars(twin).update(shared, state=every, param_groups=[{**group, "params": [p]}])
    return twin


def _taken(value: Any, part: slice | None, brought: Tensor | None) -> Any:
    """What of a state the update of some elements reads and writes."""
    if brought is not None:
        return brought.as_strided(value.shape, value.stride()) if part is None else brought
    if part is None or not isinstance(value, Tensor):
        return value
    return flat(value)[part] if value.dim() else value.clone()  # each part counts the step


def _given(
    key: str, value: Any, taken: Any, part: slice | None, p: Tensor, new: Mapping[str, Any], state: Mapping[str, Any],
    away: Away | None,
) -> Any:  # fmt: skip
    """What the parameter's state is after the update of some elements, which left this value."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if away is not None and key in away.homes:
        return away.homes[key]
    if part is None or value is taken:
        return value if part is None else state[key]
    whole: Tensor = new[key] if key in new else torch.empty_like(p, dtype=value.dtype)
    flat(whole)[part].copy_(value)
    return whole
