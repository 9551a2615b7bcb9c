"""Natural GaLore: GaLore's small gradient turned by the inverse empirical Fisher matrix of the latest of them (Das,
arXiv:2410.16029).

With the `history` latest small gradients, each as one long vector, as the columns of G, the newest last, Adam is given
(damping I + G G^T)^-1 g in place of the newest one, g. By Woodbury's identity that is G y, where
(damping I + G^T G) y = (0, ..., 0, 1)^T: a system of `history` unknowns. (The paper's way to write it, g / damping -
G (damping I + G^T G)^-1 G^T g / damping, subtracts two numbers that are nearly equal, as g is a column of G.) The
columns stay when the projector changes, as in the author's code. Bytes beyond GaLore's of a matrix (m, n) projected to
(r, n): 4 `history` r n, so `history` times a moment's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim.family import State
from memopt.optim.galore import GaLore
from memopt.optim.subspace import small_shape

HISTORY = "history"  # (how many, elements): a row each, the oldest overwritten


class NaturalGaLore(GaLore):
    """history: how many small gradients make the Fisher matrix. damping: what is added to its diagonal. The defaults
    are those of the author's code."""

    own = frozenset({"history", "damping"})

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, history: int = 20, damping: float = 1e-3, **options: Any
    ) -> None:
        super().__init__(params, lr, **{"history": history, "damping": damping, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check both options and add the group."""
        group = {**self.defaults, **param_group}
        if not (isinstance(group["history"], int) and group["history"] >= 1):
            raise ValueError(f"history={group['history']!r} refused: it must be a whole number, 1 or more")
        if not group["damping"] > 0:
            raise ValueError(f"damping={group['damping']!r} refused: it must be above 0")
        super().add_param_group(param_group)

    def begin(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """GaLore's state, and room for the small gradients."""
        rows, columns = small_shape(p, group)
        return {**super().begin(p, group), HISTORY: torch.zeros(group["history"], rows * columns, device=p.device)}

    def turned(self, small: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
        """The small gradient by the inverse Fisher matrix; rows that are not filled yet are zero and add nothing."""
        history: Tensor = state[HISTORY]
        newest = (int(state["step"]) - 1) % len(history)
        history[newest] = small.reshape(-1)
        system = (history @ history.mT).double()
        system.diagonal().add_(group["damping"])
        wanted = torch.zeros_like(system[0])
        wanted[newest] = 1.0
        shares: Tensor = torch.linalg.solve(system, wanted)
        return (shares.float() @ history).view_as(small)
