"""What one call asks for, resolved: bytes, device, levers, and what may run the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memopt.devices import Device
from memopt.edit import DISK, GRADIENT, HOST
from memopt.passbase import Rewrite
from memopt.plans import MAX_GRAD_ERROR
from memopt.rewrites import permitted


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved. budget: bytes. passes: names switched off ("-recompute").

    accumulate: forwards and backwards per update. lowering: "eager" or "inductor", never "auto" here. spare: the one to
    take where no plan of the first holds the budget; "" where the first was asked for by name. host, disk: bytes that
    offloads may take there, and the codec of the pool they go to. max_grad_error: relative, of lossy levers together.
    update: "backward" if parameters may be updated there, where the budget needs it. states: names of ways to store
    AdamW's moments in fewer bits that may be used (memopt/optim/precision.py), in the order to try them; weights: the
    same of frozen weights, (name, codec) (memopt/weights.py). quick: it is only compared with others: no lower bound is
    sought, nor the lowest peak where none can be within the budget. kernels: whether fused regions become kernels of
    their own in the eager lowering.
    """

    budget: int
    device: Device
    lowering: str
    model: str = "model"
    optimizer: torch.optim.Optimizer | None = None
    has_optimizer: bool = True
    numerics: str = "reordered"
    off: frozenset[str] = frozenset()
    accumulate: int = 1
    time_limit: float = 20.0
    host: tuple[int, str] = (0, "")
    disk: tuple[int, str] = (0, "")
    max_grad_error: float = MAX_GRAD_ERROR
    spare: str = ""
    update: str = "step"
    states: tuple[str, ...] = ()
    weights: tuple[tuple[str, str], ...] = ()
    quick: bool = False
    kernels: bool = False

    @property
    def lowerings(self) -> tuple[str, ...]:
        """Those that may run the step, the one to try first in front."""
        return (self.lowering, self.spare) if self.spare else (self.lowering,)

    @property
    def limits(self) -> dict[str, float]:
        """What packing may take of resources besides memory and time."""
        return {
            GRADIENT: self.max_grad_error * self.max_grad_error,
            HOST: float(self.host[0]),
            DISK: float(self.disk[0]),
        }

    @property
    def rewrites(self) -> tuple[type[Rewrite], ...]:
        """Of the forward, those that may run: not switched off, and of no other rounding where it must be exact."""
        return permitted(self.numerics, self.off)

    def without(self, left_out: frozenset[str]) -> tuple[type[Rewrite], ...]:
        """Those rewrites but for some."""
        return tuple(rewrite for rewrite in self.rewrites if rewrite.name not in left_out)

    @property
    def exact(self) -> bool:
        """Whether kernels are to be those of untraced torch on CPU (`memopt.lowering.lower`)."""
        return self.numerics == "exact" and self.device.kind == "cpu"
