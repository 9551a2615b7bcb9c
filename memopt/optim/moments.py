"""Adam's two moments of a tensor, stored as asked, advanced a chunk at a time (Kingma and Ba, arXiv:1412.6980).

m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  direction = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim.family import State, elements, in_order, portions
from memopt.optim.stored import KINDS, Blocks, stores

FIRST, SECOND = "exp_avg", "exp_avg_sq"  # torch.optim.AdamW's names
DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
LEAST = 4096  # elements below which moments stay in fp32, as in bitsandbytes and torchao: norms and biases need it


def check_kind(kind: str) -> None:
    """ValueError for a way of storing that there is none of."""
    if kind not in KINDS:
        raise ValueError(f"state={kind!r} is not known; known are {', '.join(KINDS)}")


def empty_moments(like: Tensor, group: Mapping[str, Any]) -> State:
    """Both moments of a tensor of this shape and layout, zero. group: "state" and "least"."""
    first, second = stores(group["state"], like.numel(), group["least"])
    return {FIRST: first.empty(like), SECOND: second.empty(like)}


def directions(grad: Tensor, like: Tensor, state: State, group: Mapping[str, Any]) -> Iterator[tuple[slice, Tensor]]:
    """Advance the moments by a gradient and give the direction, fp32, of one part of the elements after another.

    Elements are in the memory order of `like`, which the state was made for.
    """
    first, second = stores(group["state"], like.numel(), group["least"])
    (beta1, beta2), step = group["betas"], float(state["step"])
    gradient = in_order(grad, like)
    one, two = first.tables(like.device), second.tables(like.device)
    for part in portions(like.numel(), elements(like.device)):
        g = gradient[part].float()
        m, v = first.read(state[FIRST], part, one), second.read(state[SECOND], part, two)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        first.write(state[FIRST], part, m, 2 * int(step), one)
        second.write(state[SECOND], part, v, 2 * int(step) + 1, two)
        size = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        yield part, torch.div(m, size, out=size).div_(1 - beta1**step)


def moved(values: Tensor, direction: Tensor, kept: float, rate: float) -> None:
    """values <- kept values - rate direction, in fp32 where they have less precision. kept = 0 reads no values."""
    if not kept:
        values.copy_(direction.mul_(-rate))
    elif values.dtype is torch.float32:
        values.mul_(kept).add_(direction, alpha=-rate)
    else:
        values.copy_(values.float().mul_(kept).add_(direction, alpha=-rate))


def encoded(key: str, value: Tensor, like: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    """A moment given as values of the shape of `like`, stored as this group stores it; None if it is no such thing."""
    if key not in (FIRST, SECOND) or value.shape != like.shape or not value.is_floating_point():
        return None
    store = stores(group["state"], like.numel(), group["least"])[key == SECOND]
    made, values, tables = store.empty(like), in_order(value.to(like.device), like), store.tables(like.device)
    for part in portions(like.numel(), elements(like.device)):
        part_of = values[part].float()
        store.read(made, part, tables).copy_(part_of)  # in fp32 this is the storing
        store.write(made, part, part_of, 0, tables)
    return made


def decoded(key: str, stored: Tensor, like: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A stored moment as fp32 values of the shape of `like`."""
    store = stores(group["state"], like.numel(), group["least"])[key == SECOND]
    made, tables = torch.empty_like(like, dtype=torch.float32), store.tables(like.device)
    for part in portions(like.numel(), elements(like.device)):
        in_order(made, made)[part] = store.read(stored, part, tables)
    return made


def coded_part(key: str, stored: Tensor, like: Tensor, part: slice, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Views of the scales and codes of some elements of a moment in codes; the part begins where a block does."""
    store = stores(group["state"], like.numel(), group["least"])[key == SECOND]
    assert isinstance(store, Blocks)
    return store.split(stored, part)
