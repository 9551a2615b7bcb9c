"""Smaller inputs for a step that does not fit: which sizes to try, so that few captures find the largest that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from memopt.errors import WayOut

CAPTURES = 3  # of the step at other sizes, a dimension; each is most of what a plan costs
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Tried:
    """A size that was planned. least: the floor there, bytes, or the peak of a plan that fits."""

    size: int
    least: int
    way: WayOut


def largest_fitting(
    plan_at: Callable[[int], Tried | None], sizes: Sequence[int], size: int, least: int, budget: int
) -> WayOut | None:
    """The way out of the largest of `sizes` found to fit within CAPTURES plans, else that of the smallest one tried.

    plan_at: None for a size that the model does not take, which ends the search. sizes: rising, below `size`, which was
    refused with a floor of `least` bytes. None if nothing could be planned.
    """
    tried: list[Tried] = []
    for _ in range(CAPTURES):
        at = next_size(tried, sizes, (size, least), budget)
        found = None if at is None else plan_at(at)
        if found is None:
            break
        tried.append(found)
    fitting = [t for t in tried if t.way.fits]
    best = max(fitting, key=lambda t: t.size) if fitting else min(tried, key=lambda t: t.size, default=None)
    return best.way if best else None


def next_size(tried: Sequence[Tried], sizes: Sequence[int], refused: tuple[int, int], budget: int) -> int | None:
    """The size to plan next, between the largest known to fit and the smallest known not to; None: none is left.

    The least peak is nearly affine in a size: the largest of `sizes` that the line through the two points nearest to
    the budget allows. One point makes no line: half of it.
    """
    over = sorted([refused, *((t.size, t.least) for t in tried if not t.way.fits)])
    low = max(((t.size, t.least) for t in tried if t.way.fits), default=None)
    between = [size for size in sizes if (low[0] if low else 0) < size < over[0][0]]
    if not between:
        return None
    other = low or (over[1] if len(over) > 1 else None)
    guess = crossing(over[0], other, budget) if other else over[0][0] / 2
    under = [size for size in between if size <= guess]
    if under:
        return under[-1]
    return None if low else between[0]


def crossing(a: tuple[int, int], b: tuple[int, int], budget: int) -> float:
    """The size at which the line through two (size, bytes) reaches the budget; 0.0 if it does not rise with size."""
    slope = (a[1] - b[1]) / (a[0] - b[0])
    return a[0] - (a[1] - budget) / slope if slope > 0 else 0.0


def sizes_below(size: int, dim: int) -> Sequence[int]:
    """What may take the place of a size: of a batch what accumulates to it, its divisors; of a sequence any."""
    return range(1, size) if dim else [part for part in range(1, size // 2 + 1) if size % part == 0]


def shared_size(call: Call, dim: int) -> int | None:
    """The size above 1 that all inputs have along this dimension, else None. Dimension 1: of token ids alone."""
    tensors = [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    if dim == 1 and any(tensor.dim() != 2 or tensor.is_floating_point() for tensor in tensors):
        return None
    sizes = {int(tensor.shape[dim]) for tensor in tensors}
    size = sizes.pop() if len(sizes) == 1 else 0
    return size if size > 1 else None


def cut(call: Call, dim: int, size: int) -> Call:
    """The call with every tensor cut to its first `size` along the dimension."""

    def first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(dim, 0, size).contiguous() if tensor.dim() > dim else tensor

    made: Call = tree_map_only(torch.Tensor, first, call)
    return made
