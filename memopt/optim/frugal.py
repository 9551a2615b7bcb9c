"""FRUGAL: AdamW on some columns of a matrix, the sign of the gradient on the others (Zmushko et al., arXiv:2411.07837).

density n of the n columns, drawn anew every update_proj_gap updates from a seed, have moments; the moments of a column
that stays are kept, those of a new one begin at zero (the projection of the old state onto the new columns). W moves by
-lr direction there, by -lr scale sign(G) elsewhere, and decays everywhere. Bytes of a matrix (m, n): 8 m density n. Of
the projections in the paper this is the column-wise one. Parameters that are no matrices are AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim import moments
from memopt.optim.family import State
from memopt.optim.subspace import Projected, apply, generator, small_direction, turns


class Frugal(Projected):
    """density: the share of a matrix's columns that have moments, in (0, 1]; scale: the others' rate over lr."""

    own = frozenset({"density", "seed"})

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, density: float = 0.25, scale: float = 1.0,
        update_proj_gap: int = 200, seed: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        chosen = {"density": density, "scale": scale, "update_proj_gap": update_proj_gap, "seed": seed}
        super().__init__(params, lr, {**chosen, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check the density and add the group."""
        density = {**self.defaults, **param_group}["density"]
        if not 0 < density <= 1:
            raise ValueError(f"density={density!r} refused: it is a share of the columns, above 0 and at most 1")
        super().add_param_group(param_group)

    def projects(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Every matrix."""
        return p.dim() == 2

    def begin(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """Moments of the chosen columns."""
        return moments.empty_moments(p.new_empty((p.shape[0], _count(p, group)), dtype=torch.float32), group)

    def project(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One step of a matrix."""
        turn, new = turns(state, group)
        columns = chosen(p, group, turn)
        if new and turn:
            self.carry(p, state, group, chosen(p, group, turn - 1), columns)
        direction = small_direction(grad[:, columns].float(), state, group)

        def update(some: slice) -> Tensor:
            made = grad[some].float().sign().mul_(group["scale"])
            made[:, columns] = direction[some]
            return made

        apply(p, group, update)

    def carry(self, p: Tensor, state: State, group: Mapping[str, Any], old: Tensor, new: Tensor) -> None:
        """The moments of the new columns: what they were, and zero for those that had none."""
        like = p.new_empty((p.shape[0], old.numel()), dtype=torch.float32)
        for key in (moments.FIRST, moments.SECOND):
            values = moments.decoded(key, state[key], like, group)
            wide = values.new_zeros(p.shape)
            wide[:, old] = values
            made = moments.encoded(key, wide[:, new], like, group)
            assert made is not None
            state[key].copy_(made)


def _count(p: Tensor, group: Mapping[str, Any]) -> int:
    """How many columns have moments."""
    share: float = group["density"]
    return max(1, round(share * p.shape[1]))


def chosen(p: Tensor, group: Mapping[str, Any], turn: int) -> Tensor:
    """The columns that have moments, ascending."""
    drawn = torch.randperm(p.shape[1], generator=generator(p, group["seed"], turn))
    return drawn[: _count(p, group)].sort().values.to(p.device)
