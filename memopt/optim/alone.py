"""One parameter's update by itself: in pieces, its state fetched from where it lies and stored there again.

An elementwise update of some elements is that of the whole parameter for these elements, to the bit. On a CPU that
holds for fp32 and wider only: torch adds 16-bit numbers that fill no whole vector with another rounding, and where
those are depends on where a tensor ends and on the number of threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.optim.adamw import AdamW, AdamW4bit, AdamW8bit, AdamWBf16
from memopt.optim.family import dense, in_order, plain_step, portions
from memopt.optim.moved import LEAST, State
from memopt.optim.stored import flat

# Their update of an element depends on that element's own past alone; the very classes, as in memopt/optim/portions.py.
ELEMENTWISE = frozenset({
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax),
    *(torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD),
})  # fmt: skip
# Whose state can lie elsewhere: at every update it is of the same bytes.
MOVABLE = ELEMENTWISE | {AdamW, AdamWBf16, AdamW8bit, AdamW4bit}
PIECES = 32  # of the largest parameter: finer ones save little, and each is a round of kernels
ALIGNED = 4096  # elements a piece is a multiple of: vectors and threads begin where they would in the whole


def piece(optimizer: Optimizer, portion: int | None, p: Tensor, kind: str) -> int | None:
    """Elements of a parameter to update at a time, for portions of so many bytes; None: all of it. kind: of the device
    that updates it, which is not the one that a fake parameter is on."""
    if portion is None or p.numel() * p.element_size() <= portion or not cuttable(optimizer, p, kind):
        return None
    largest = max(each.numel() for group in optimizer.param_groups for each in group["params"])
    least = max(LEAST, -(-largest // PIECES))
    elements = max(portion // p.element_size(), least)
    elements = -(-elements // ALIGNED) * ALIGNED
    return elements if elements < p.numel() else None


def cuttable(optimizer: Optimizer, p: Tensor, kind: str) -> bool:
    """Whether updates of parts of this parameter are known to be that of the whole, to the bit."""
    group = group_of(optimizer, p)
    if type(optimizer) is AdamW:  # computes in fp32 whatever the parameter
        return bool(group["state"] == "fp32") and dense(p)
    wide = kind != "cpu" or p.element_size() >= torch.float32.itemsize
    plain = p.is_floating_point() and dense(p) and not (p.grad is not None and p.grad.is_sparse)
    return type(optimizer) in ELEMENTWISE and wide and plain and not group.get("fused")


def group_of(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    """The group of this parameter."""
    return next(group for group in optimizer.param_groups if any(each is p for each in group["params"]))


def update_alone(optimizer: Optimizer, p: Tensor, each: int | None, homes: State | None) -> None:
    """Update this parameter, `each` elements at a time (None: all), with its state in these homes (None: beside it)."""
    assert p.grad is not None
    gradient = p.grad if each is None else in_order(p.grad, p)
    new: dict[str, Any] = {}
    for part in (None,) if each is None else portions(p.numel(), each):
        _update_part(optimizer, p, part, gradient if part is None else gradient[part], homes, new)
    state = optimizer.state[p]
    for key, value in new.items():
        if isinstance(value, Tensor) and value.dim() == 0 and key in state:
            state[key].copy_(value)  # the very tensor, as a whole update leaves it
        else:
            state[key] = value


def _update_part(
    optimizer: Optimizer, p: Tensor, part: slice | None, gradient: Tensor, homes: State | None, new: dict[str, Any]
) -> None:
    """Update some elements; what the state of all is after that comes into `new`. What it fetched ends with it."""
    state = optimizer.state.get(p, {})
    some = p if part is None else flat(p.detach())[part]
    some.grad = gradient
    own = {key: _taken(value, part, some, homes) for key, value in state.items()}
    twin = _over(optimizer, group_of(optimizer, p), some, own)
    plain_step(twin)
    for key, value in twin.state[some].items():
        new[key] = _given(key, value, own.get(key), part, p, new, state, homes)


def _over(optimizer: Optimizer, group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> Optimizer:
    """The optimizer over one tensor with this state."""
    twin: Optimizer = object.__new__(type(optimizer))
    shared = {key: value for key, value in vars(optimizer).items() if key != "step" and not key.endswith("_hooks")}
    every: defaultdict[Tensor, Any] = defaultdict(dict, {p: dict(state)} if state else {})
    vars(twin).update(shared, state=every, param_groups=[{**group, "params": [p]}])
    return twin


def _taken(value: Any, part: slice | None, some: Tensor, homes: State | None) -> Any:
    """What of a state the update of some elements reads and writes."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        return value.clone() if part is not None else value  # each part counts the step
    if homes is not None:
        start, stop = (0, value.numel()) if part is None else (part.start, part.stop)
        fetched: Tensor = torch.ops.memopt.read_state(value, start, stop, some.device)
        return fetched.as_strided(value.shape, value.stride()) if part is None else fetched
    return value if part is None else flat(value)[part]


def _given(
    key: str, value: Any, taken: Any, part: slice | None, p: Tensor, new: Mapping[str, Any], state: Mapping[str, Any],
    homes: State | None,
) -> Any:  # fmt: skip
    """What the parameter's state is after the update of some elements, which left this value."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if homes is not None:
        torch.ops.memopt.write_state(homes[key], flat(value), 0 if part is None else part.start)
        return homes[key]
    if part is None or value is taken:
        return value if part is None else state[key]
    whole: Tensor = new[key] if key in new else torch.empty_like(p, dtype=value.dtype)
    flat(whole)[part].copy_(value)
    return whole
