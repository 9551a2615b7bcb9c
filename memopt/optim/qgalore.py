"""Q-GaLore: GaLore with a 4-bit projector that is made anew ever more rarely (Zhang et al., arXiv:2407.08296).

A projector is stored by groups of 256 elements: with s = (max - min) / 15 and z = round(-min / s), an element x is the
code round(x / s) + z in 0..15 and is read as s (code - z). At each new projector its first vector is compared with the
last one's; where the latest `checks` cosines are `alike` on average, the matrix's gap is doubled. The sign of a
singular vector is the library's whim, so cosines count without theirs (the authors' code takes them as they come).
Moments are in 8 bits. The paper's weights in INT8 are no part of this optimizer.

Parameters, gradients and keys of a group are GaLore's (memopt/optim/galore.py). Bytes of a matrix projected on a side
of m to rank r, beside the moments: m r / 2 of codes, 5 a group of them, 4 m for the vector that is compared, and
4 (2 + checks).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim.family import State
from memopt.optim.galore import GaLore, shape_of
from memopt.optim.stored import SMALLEST

GROUP = 256
LEVELS = 15
GROWTH = 2.0  # of a gap


class QGaLore(GaLore):
    """alike: a cosine in [0, 1]. checks: how many are averaged. The defaults are those of the authors' code."""

    own = frozenset({"alike", "checks"})

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, alike: float = 0.4, checks: int = 5, **options: Any
    ) -> None:
        super().__init__(params, lr, **{"state": "int8", "alike": alike, "checks": checks, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check both options and add the group."""
        group = {**self.defaults, **param_group}
        if not 0 <= group["alike"] <= 1:
            raise ValueError(f"alike={group['alike']!r} refused: it is a cosine, from 0 to 1")
        if not (isinstance(group["checks"], int) and group["checks"] >= 1):
            raise ValueError(f"checks={group['checks']!r} refused: it must be a whole number, 1 or more")
        super().add_param_group(param_group)

    def begin(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """GaLore's, the projector in codes, and its first vector and (gap, cosines seen, the latest ones)."""
        side, rank = shape_of(p, group)
        rhythm = torch.zeros(2 + group["checks"], device="cpu")  # read at every step, as its number is
        rhythm[0] = group["update_proj_gap"]
        codes = torch.zeros(nbytes(side * rank), dtype=torch.uint8, device=p.device)
        first = torch.zeros(side, device=p.device)
        return {**super().begin(p, group), "projector": codes, "first": first, "rhythm": rhythm}

    def turns(self, state: State, group: Mapping[str, Any]) -> bool:
        """By the matrix's own gap."""
        return (int(state["step"]) - 1) % int(state["rhythm"][0]) == 0

    def turn(self, vectors: Tensor, p: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """Make the new projector, and the gap longer if it is like the last ones."""
        first = state["first"]
        if int(state["step"]) > 1:
            self.compared(float((first @ vectors[:, 0]).abs()), state["rhythm"], group)
        first.copy_(vectors[:, 0])
        whole = first.new_zeros(shape_of(p, group))
        whole[:, : vectors.shape[1]] = vectors
        encode(whole, state["projector"])

    def compared(self, cosine: float, rhythm: Tensor, group: Mapping[str, Any]) -> None:
        """Note a cosine of two vectors of length 1."""
        seen, checks = int(rhythm[1]), group["checks"]
        rhythm[2 + seen % checks] = cosine
        rhythm[1] += 1
        if seen + 1 >= checks and float(rhythm[2:].mean()) >= group["alike"]:
            rhythm[0] *= GROWTH

    def projector(self, p: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
        """(side, rank), fp32, of its codes."""
        side, rank = shape_of(p, group)
        return decode(state["projector"], side * rank).view(side, rank)


def nbytes(count: int) -> int:
    """Bytes for so many elements: whole groups."""
    return -(-count // GROUP) * (4 + 1 + GROUP // 2)


def split(stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of s, z and the codes, two to a byte, of each group."""
    groups = stored.numel() // nbytes(GROUP)
    steps, zeros, codes = stored.split((4 * groups, groups, groups * GROUP // 2))
    return steps.view(torch.float32), zeros, codes.view(groups, -1)


def encode(x: Tensor, stored: Tensor) -> None:
    """Store a projector. A group's range is widened to hold 0, which z cannot stand for otherwise."""
    steps, zeros, codes = split(stored)
    rows = x.new_zeros(len(steps), GROUP)
    rows.view(-1)[: x.numel()] = x.reshape(-1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    steps.copy_(((high - low) / LEVELS).clamp(min=SMALLEST))
    zeros.copy_((-low / steps).round())
    found = rows.div_(steps[:, None]).round_().add_(zeros[:, None]).clamp_(0, LEVELS).to(torch.uint8)
    codes.copy_(found[:, ::2] | found[:, 1::2] << 4)


def decode(stored: Tensor, count: int) -> Tensor:
    """The first `count` elements in fp32, flat."""
    steps, zeros, codes = split(stored)
    values = torch.stack((codes & LEVELS, codes >> 4), -1).view(len(steps), -1).float()
    return values.sub_(zeros[:, None]).mul_(steps[:, None]).view(-1)[:count]
