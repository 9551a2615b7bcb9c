"""GaLore: Adam in a low-rank space of the gradient (Zhao et al., arXiv:2403.03507, algorithm 2), in fp32 or 8 bits.

Every update_proj_gap updates P <- the first `rank` left (right) singular vectors of G. Then R = P^T G (G P), Adam's
direction N of R, and W <- W - lr (scale P N + wd W); moments stay as they are when P changes. Bytes of a matrix (m, n)
projected to (r, n): 8 r n of moments (2 r n in 8 bits) and 4 r m of P. The decomposition takes about two further
gradients while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim.family import State
from memopt.optim.subspace import Projected, apply, left, small_direction, turns


class GaLore(Projected):
    """AdamW whose groups may give a rank; see memopt/optim/subspace.py for the keys."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, {"update_proj_gap": 200, "scale": 0.25, **options})

    def begin(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """Moments and projector."""
        side = p.shape[0] if left(p, group) else p.shape[1]
        projector = torch.zeros(side, min(group["rank"], side), device=p.device)
        return {**super().begin(p, group), "projector": projector}

    def project(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One step of a matrix."""
        g, on_left, projector = grad.float(), left(p, group), state["projector"]
        if turns(state, group)[1]:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            basis = u if on_left else vh.mT
            # a wide side with fewer singular vectors than the rank leaves the further columns zero
            projector.zero_()[:, : basis.shape[1]] = basis[:, : projector.shape[1]]
            del u, vh, basis
        small = self.turned(projector.mT @ g if on_left else g @ projector, state, group)
        small = small_direction(small, state, group).mul_(group["scale"])
        apply(p, group, lambda some: projector[some] @ small if on_left else small[some] @ projector.mT)

    def turned(self, small: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
        """What Adam is given of a projected gradient: all of it, as it is."""
        return small


class GaLore8bit(GaLore):
    """GaLore with its moments in 8 bits by blocks of 256."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"state": "int8", **options})
