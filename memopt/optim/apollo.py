"""APOLLO: AdamW's step sizes, learnt from a random low-rank image of the gradient (Zhu et al., arXiv:2412.05270).

R = P G (or G P^T), P (rank, side) of normal values of variance 1 / rank, drawn anew from a seed every update_proj_gap
updates and never stored. With N Adam's direction of R: s = |N_j| / |R_j| a channel j of the longer side ("channel"), or
|N| / |R| of the whole matrix ("tensor": APOLLO-Mini, rank 1). W <- W - lr (sqrt(scale) L(G s) + wd W); the limiter L
(Fira, arXiv:2410.01623) lets the length of G s grow by 1 % an update at most. The factor sqrt(scale) is that of the
authors' code; the paper's alpha. Bytes of a matrix (m, n), m < n: 8 rank n, and 4 for the last length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim.family import State
from memopt.optim.subspace import Projected, apply, generator, left, small_direction, times, turns, wide_rows

GROWTH = 1.01
NOTHING = 1e-8


class Apollo(Projected):
    """AdamW whose groups may give a rank; see memopt/optim/subspace.py for the keys. seed: of the projections."""

    own = frozenset({"seed"})
    tensorwise = False

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, {"update_proj_gap": 200, "scale": 1.0, "seed": 0, **options})

    def begin(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """Moments of the image, and the length of the last update."""
        return {**super().begin(p, group), "length": torch.zeros((), device=p.device)}

    def project(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One step of a matrix."""
        on_left = left(p, group)
        image = project(grad, p, state, group)
        direction = small_direction(image, state, group)
        scaling = self.scaling(direction, image, on_left)
        length = torch.linalg.vector_norm(_lengths(grad, on_left) * scaling)
        last = state["length"]
        limited = torch.where(last > 0, torch.minimum(length, GROWTH * (last + NOTHING)), length)
        state["length"].copy_(limited)
        factor = scaling * (math.sqrt(group["scale"]) * limited / length.clamp(min=torch.finfo(torch.float32).tiny))
        apply(p, group, lambda some: grad[some].float() * (factor if on_left or self.tensorwise else factor[some]))

    def scaling(self, direction: Tensor, image: Tensor, on_left: bool) -> Tensor:
        """Step size over gradient: a channel (1, n) or (m, 1), or of the whole."""
        if self.tensorwise:
            whole: Tensor = torch.linalg.vector_norm(direction) / (torch.linalg.vector_norm(image) + NOTHING)
            return whole
        return _lengths(direction, on_left) / (_lengths(image, on_left) + NOTHING)


class ApolloMini(Apollo):
    """APOLLO with one step size a matrix, from a rank of 1 where the group gives one."""

    tensorwise = True

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"scale": 128.0, **options})


def project(g: Tensor, p: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    """The gradient's image under the projection in use."""
    on_left = left(p, group)
    side = p.shape[0] if on_left else p.shape[1]
    rank = min(group["rank"], side)
    drawn = torch.randn(rank, side, generator=generator(p, group["seed"], turns(state, group)[0])) / math.sqrt(rank)
    drawn = drawn.to(p.device)
    return times(g, drawn.mT, on_left)


def _lengths(matrix: Tensor, on_left: bool) -> Tensor:
    """Of the columns (1, n) if the rows were projected, else of the rows (m, 1), in fp32."""
    dim = 0 if on_left else 1
    if matrix.dtype is torch.float32:
        found: Tensor = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
        return found
    squares = torch.zeros((1, matrix.shape[1]) if on_left else (matrix.shape[0], 1), device=matrix.device)
    for some in wide_rows(matrix):
        part = matrix[some].float().square_().sum(dim, keepdim=True)
        squares[slice(None) if on_left else some] += part
    return squares.sqrt_()
