"""Which side of a gradient is projected, from what seed, and how an update is applied: for GaLore, APOLLO and FRUGAL.

GaLore's keys of a parameter group: rank, update_proj_gap (updates between two projections), scale, proj_type. A matrix
(m, n) is projected on the side proj_type names: "left" gives (rank, n), "right" (m, rank); "std" projects the shorter
side, "reverse_std" the longer one. Groups without a rank, and parameters that are no matrices, are AdamW's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from memopt.optim import moments
from memopt.optim.adamw import move
from memopt.optim.family import Family, State, count, portions, rows
from memopt.optim.fused import advance

WIDE = 1 << 22  # elements at a time of what is multiplied: 16 MB in fp32, enough for a product's speed
SIDES = ("std", "reverse_std", "left", "right")


class Projected(Family):
    """Base of the families whose matrices have their moments in a smaller space. Needs `begin` and `project`.

    own: the options that a family has besides AdamW's and those that all of these have."""

    own: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: Iterable[Any], lr: float, options: Mapping[str, Any]) -> None:
        known = {"state": "fp32", "least": moments.LEAST, "rank": None, "proj_type": "std", **moments.DEFAULTS}
        if unknown := options.keys() - known.keys() - {"update_proj_gap", "scale"} - self.own:
            raise ValueError(f"{min(unknown)} is no option of {type(self).__name__}")
        super().__init__(params, {"lr": lr, **known, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check GaLore's keys and add the group."""
        group = {**self.defaults, **param_group}
        moments.check_kind(group["state"])
        if group["proj_type"] not in SIDES:
            raise ValueError(f"proj_type={group['proj_type']!r} is not known; known are {', '.join(SIDES)}")
        for key in ("rank", "update_proj_gap"):
            if group.get(key) is not None and group[key] < 1:
                raise ValueError(f"{key}={group[key]!r} refused: it must be 1 or more")
        super().add_param_group(param_group)

    def start(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """AdamW's state, or that of the smaller space."""
        if not self.projects(p, group):
            return {"step": count(), **moments.empty_moments(p, group)}
        return {"step": count(), **self.begin(p, group)}

    def update(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One step, AdamW's or the projected one."""
        if self.projects(p, group):
            self.project(p, grad, state, group)
        else:
            move(p, grad, state, group)

    def projects(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether a parameter is one of the matrices that are projected."""
        return p.dim() == 2 and group["rank"] is not None

    def begin(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """The state of a projected matrix, without its step."""
        return moments.empty_moments(p.new_empty(small_shape(p, group), dtype=torch.float32), group)

    @abstractmethod
    def project(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One step of a projected matrix."""


def left(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the rows' side is the one projected."""
    kind = group["proj_type"]
    return bool(
        kind == "left"
        or (p.shape[0] < p.shape[1] if kind == "std" else False)
        or (kind == "reverse_std" and p.shape[0] >= p.shape[1])
    )


def small_shape(p: Tensor, group: Mapping[str, Any]) -> tuple[int, int]:
    """Shape of the projected gradient; a rank above the side's length is that length."""
    m, n = p.shape
    return (min(group["rank"], m), n) if left(p, group) else (m, min(group["rank"], n))


def turns(state: State, group: Mapping[str, Any]) -> tuple[int, bool]:
    """The number of the projection that is in use, from 0, and whether it is new in this update."""
    done = int(state["step"]) - 1
    return done // group["update_proj_gap"], done % group["update_proj_gap"] == 0


def generator(p: Tensor, seed: int, turn: int) -> torch.Generator:
    """Draws the same for the same shape, seed and turn, wherever the parameter is."""
    mixed = (seed * 1_000_003 + turn) * 1_000_003 + p.numel()
    return torch.Generator(device="cpu").manual_seed(mixed & (1 << 62) - 1)


def times(g: Tensor, side: Tensor, on_left: bool) -> Tensor:
    """side^T G, or G side, of a gradient of any type, in fp32. side: (rows or columns of G, k) in fp32.

    Of a gradient of less precision no copy in fp32 is held, but of some rows at a time."""
    if g.dtype is torch.float32:
        return side.mT @ g if on_left else g @ side
    shape = (side.shape[1], g.shape[1]) if on_left else (g.shape[0], side.shape[1])
    made = torch.zeros(shape, device=g.device)
    for some in wide_rows(g):
        if on_left:
            made.addmm_(side[some].mT, g[some].float())
        else:
            made[some].addmm_(g[some].float(), side)
    return made


def wide_rows(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows that are multiplied at a time."""
    return portions(matrix.shape[0], max(1, WIDE // max(1, matrix.shape[1])))


def small_direction(small: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    """Adam's direction of a projected gradient, of its shape; the moments advance."""
    made = torch.empty_like(small)
    advance(made, small, small, state, group, 0.0, -1.0)
    return made


def apply(p: Tensor, group: Mapping[str, Any], update: Any) -> None:
    """Decay and move a matrix by `update(rows)`, some rows at a time."""
    kept = 1 - group["lr"] * group["weight_decay"]
    for some in rows(p):
        moments.moved(p[some], update(some), kept, group["lr"])
