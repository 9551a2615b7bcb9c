"""GaLore: Adam in a low-rank space of the gradient (Zhao et al., arXiv:2403.03507, algorithm 2), in fp32 or 8 bits.

Every update_proj_gap updates P <- the first `rank` left (right) singular vectors of G. Then R = P^T G (G P), Adam's
direction N of R, and W <- W - lr (scale P N + wd W); moments stay as they are when P changes. Bytes of a matrix (m, n)
projected to (r, n): 8 r n of moments (2 r n in 8 bits) and 4 r m of P. While a new P is made, the eigenvectors of
the smaller Gram matrix take 32 min(m, n)^2 and the gradient's rows in fp64 besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim.family import State, rows
from memopt.optim.subspace import Projected, apply, left, small_direction, times, turns


class GaLore(Projected):
    """AdamW whose groups may give a rank; see memopt/optim/subspace.py for the keys."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, {"update_proj_gap": 200, "scale": 0.25, **options})

    def begin(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """Moments and projector."""
        return {**super().begin(p, group), "projector": torch.zeros(*shape_of(p, group), device=p.device)}

    def project(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One step of a matrix."""
        on_left = left(p, group)
        if self.turns(state, group):
            self.turn(singular_vectors(grad, on_left, group["rank"]), p, state, group)
        projector = self.projector(p, state, group)
        small = self.turned(times(grad, projector, on_left), state, group)
        small = small_direction(small, state, group).mul_(group["scale"])
        apply(p, group, lambda some: projector[some] @ small if on_left else small[some] @ projector.mT)

    def turns(self, state: State, group: Mapping[str, Any]) -> bool:
        """Whether this update begins with a new projector."""
        return turns(state, group)[1]

    def turn(self, vectors: Tensor, p: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """Make the new projector of a gradient's singular vectors; further columns, if they are too few, are zero."""
        state["projector"].zero_()[:, : vectors.shape[1]] = vectors

    def projector(self, p: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
        """(side, rank), fp32."""
        return state["projector"]

    def turned(self, small: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
        """What Adam is given of a projected gradient: all of it, as it is."""
        return small


def shape_of(p: Tensor, group: Mapping[str, Any]) -> tuple[int, int]:
    """A projector's: the side that is projected, and the rank."""
    side = p.shape[0] if left(p, group) else p.shape[1]
    return side, min(group["rank"], side)


def singular_vectors(g: Tensor, on_left: bool, count: int) -> Tensor:
    """The first left (right) singular vectors of a matrix, as columns: `count`, or as many as it has.

    They are the eigenvectors of its smaller Gram matrix, in fp64 as its values are squares, or the matrix times these.
    Of both signs the one whose largest entry is positive.
    """
    short = g.shape[0] <= g.shape[1]  # the rows' side is the shorter one
    vectors: Tensor = torch.linalg.eigh(_gram(g, short))[1][:, -count:].flip(1).float()
    if short != on_left:
        long = times(g, vectors, False) if on_left else times(g, vectors, True).mT
        vectors = torch.linalg.qr(long)[0]  # completes what has no length
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors.mul_(vectors.gather(0, largest).sign())


def _gram(g: Tensor, short: bool) -> Tensor:
    """G G^T, or G^T G where columns are fewer, in fp64."""
    side = min(g.shape)
    made = torch.zeros(side, side, dtype=torch.float64, device=g.device)
    tall = g.mT if short else g
    for part in rows(tall):
        some = tall[part].double()
        made.addmm_(some.mT, some)
    return made


class GaLore8bit(GaLore):
    """GaLore with its moments in 8 bits by blocks of 256."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"state": "int8", **options})
