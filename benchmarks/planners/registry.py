"""The planners by name, in the order of the table. Each is a function of a work and a budget in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import cast

from benchmarks.planners.answer import Answer
from benchmarks.planners.export import Work

Planner = Callable[[Work, int], Answer]

# Name -> its module; loaded when first used, as sac_milp loads torch.
PLANNERS: Mapping[str, str] = {
    "keep_all": "keep_all",
    "sqrt_blocks": "sqrt_blocks",
    "every_block": "sqrt_blocks",
    "torch_budget": "torch_budget",
    "sac_milp": "sac_milp",
    "titan_greedy": "titan_greedy",
    "dtr": "dtr",
    "rotor": "rotor",
    "checkmate": "checkmate",
    "memopt": "memopt_plan",
}
SLOW = frozenset({"checkmate"})  # run after all the others, while there is time


def planner(name: str) -> Planner:
    """The planner of that name. KeyError if there is none."""
    module = import_module(f"benchmarks.planners.{PLANNERS[name]}")
    return cast(Planner, getattr(module, "memopt_plan" if name == "memopt" else name))
