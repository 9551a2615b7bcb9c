"""`torch.compile(model, backend="memopt", options={"budget": "24GB"})`: the entry point torch_dynamo_backends.

Dynamo hands over one graph at a time and never the optimizer, so each graph is planned by itself when it arrives:
`memopt.compile` surveys the whole model first and is the better door. The assumptions are in the plan's notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from memopt.api import make_request
from memopt.runtime.here import here
from memopt.session import Session
from memopt.unwrapped import unwrapped

KNOWN: Mapping[str, Any] = {
    "budget": "auto", "numerics": "reordered", "lowering": "auto", "passes": "", "accumulate": 1, "optimizer": "adamw",
}  # fmt: skip


@unwrapped
def memopt_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph within a budget. options: those of `KNOWN`; optimizer "adamw" (assumed) or "none".

    Raises ValueError for a mode or an option it does not know; BudgetError if the graph cannot be run in the budget.
    """
    if mode is not None:
        raise ValueError(f"mode={mode!r} is not known: the memopt backend takes options={{...}} only")
    chosen = {**KNOWN, **(options or {})}
    if unknown := [name for name in chosen if name not in KNOWN]:
        raise ValueError(f"option {unknown[0]!r} is not known; known are {', '.join(KNOWN)}")
    if chosen["optimizer"] not in ("adamw", "none"):
        raise ValueError(f"optimizer={chosen['optimizer']!r} is not known; known are adamw, none")
    _specialise(example_inputs)
    session = Session(_holder(module, example_inputs), _request(chosen, example_inputs), gradients="all")
    return session.backend(module, example_inputs)


def _specialise(inputs: Sequence[Any]) -> None:
    """Have Dynamo guard on the value of every symbolic size: bytes are held for sizes that are known, so each shape
    gets a graph and a plan of its own, as in `memopt.compile`."""
    for size in inputs:
        if isinstance(size, torch.SymInt):
            int(size)


def _request(chosen: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
    from dataclasses import replace

    tensor = next((x for x in inputs if isinstance(x, torch.Tensor)), torch.empty(0))
    request = make_request(
        here(tensor.device), chosen["budget"], None, (), chosen["numerics"], chosen["lowering"], chosen["passes"],
        chosen["accumulate"], "torch.compile",
    )  # fmt: skip
    return replace(request, has_optimizer=chosen["optimizer"] != "none")


def _holder(module: fx.GraphModule, inputs: Sequence[Any]) -> nn.Module:
    """A module that holds the graph's parameters under the names of its inputs, for the optimizer's phase."""
    holder = nn.Module()
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(value, nn.Parameter):
            holder.register_parameter(node.name, value)
    return holder
