"""Optimizers that hold less, all torch.optim.Optimizers, and the optimizer's update as a phase of the step.

Loaded when named: `from memopt.optim import AdamW8bit`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

HOMES = {
    "AdamW": "memopt.optim.adamw",
    "AdamWBf16": "memopt.optim.adamw",
    "AdamW8bit": "memopt.optim.adamw",
    "AdamW4bit": "memopt.optim.adamw",
    "Adafactor": "torch.optim",
    "Muon": "torch.optim",
    "Lomo": "memopt.optim.lomo",
    "AdaLomo": "memopt.optim.lomo",
    "GaLore": "memopt.optim.galore",
    "GaLore8bit": "memopt.optim.galore",
    "NaturalGaLore": "memopt.optim.natural",
    "QGaLore": "memopt.optim.qgalore",
    "Apollo": "memopt.optim.apollo",
    "ApolloMini": "memopt.optim.apollo",
    "Frugal": "memopt.optim.frugal",
    "Sharded": "memopt.optim.sharded",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"memopt.optim has no {name!r}; it has {', '.join(HOMES)}")
    return getattr(import_module(HOMES[name]), name)
