"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) with its moments stored in fp32, bf16, 8 or 4 bits.

p <- p - lr wd p,  p <- p - lr direction, the direction of memopt/optim/moments.py. Bytes an element of both moments: 8,
4, 2 + 8/256, 1 + 8/128; in fp32 for parameters of fewer than 4096 elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim import moments
from memopt.optim.family import Family, State, count
from memopt.optim.fused import advance

PLAIN = ("lr", "betas", "eps", "weight_decay", "params")  # what a group shares with torch.optim.AdamW's


class AdamW(Family):
    """AdamW. state: "fp32", "bf16", "int8" or "int4"; least: elements a parameter needs for it to be less than fp32."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state: str = "fp32",
        least: int = moments.LEAST,
    ) -> None:
        moments.check_kind(state)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state": state, "least": least}
        super().__init__(params, options)

    def start(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """Step and both moments."""
        return {"step": count(), **moments.empty_moments(p, group)}

    def update(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One step."""
        move(p, grad, state, group)

    def adopted(self, key: str, value: Tensor, like: Tensor, p: Tensor, group: Mapping[str, Any]) -> Tensor | None:
        """A moment of torch.optim.AdamW, or of another way to store it that is one value an element."""
        return moments.encoded(key, value, p, group)

    @torch.no_grad()
    def plain_state_dict(self) -> dict[str, Any]:
        """A state dict for torch.optim.AdamW: moments as fp32 values. What was rounded stays rounded."""
        packed = self.state_dict()
        own = [(p, group) for group in self.param_groups for p in group["params"]]
        for name, (p, group) in enumerate(own):
            if saved := packed["state"].get(name):
                values = {key: moments.decoded(key, saved[key], p, group) for key in (moments.FIRST, moments.SECOND)}
                packed["state"][name] = {"step": saved["step"], **values}
        plain = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
        packed["param_groups"] = [{**plain, **{key: g[key] for key in PLAIN}} for g in packed["param_groups"]]
        return packed


def move(p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
    """One update of a parameter whose moments are `moments.empty_moments`."""
    advance(p, grad, p, state, group, 1 - group["lr"] * group["weight_decay"], group["lr"])


class AdamWBf16(AdamW):
    """AdamW with its moments in bf16, rounded stochastically."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"state": "bf16", **options})


class AdamW8bit(AdamW):
    """AdamW with its moments in 8 bits by blocks of 256."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"state": "int8", **options})


class AdamW4bit(AdamW):
    """AdamW with its moments in 4 bits by blocks of 128."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"state": "int4", **options})
