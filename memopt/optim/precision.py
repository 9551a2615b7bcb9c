"""The user's torch.optim.AdamW with its moments stored in fewer bits: by consent, where nothing exact fits.

The object stays the same (groups, rates, schedulers, hooks); its class becomes one of memopt/optim/adamw.py and its
moments are encoded. Its checkpoints are then that class's: `plain_state_dict` gives one for torch's AdamW, and a
checkpoint of torch's AdamW can be loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.local import apart
from memopt.optim import moments
from memopt.optim.adamw import AdamW, AdamW4bit, AdamW8bit, AdamWBf16

# The least loss first: in this order they are tried.
STATES: dict[str, tuple[type[AdamW], str]] = {
    "adamw_bf16": (AdamWBf16, "bf16"),
    "adamw8bit": (AdamW8bit, "int8"),
    "adamw4bit": (AdamW4bit, "int4"),
}
WIDTHS = {"adamw_bf16": "bf16", "adamw8bit": "8 bits", "adamw4bit": "4 bits"}


def obstacle(optimizer: Optimizer | None) -> str:
    """Why its moments cannot be stored in fewer bits; "" if they can."""
    if optimizer is not None and any(apart(p) for group in optimizer.param_groups for p in group["params"]):
        return "fully_shard has sharded its parameters"
    if type(optimizer) is not torch.optim.AdamW:
        return f"{type(optimizer).__name__} is not torch.optim.AdamW" if optimizer is not None else "none was given"
    for group in optimizer.param_groups:
        for option in ("amsgrad", "maximize", "differentiable", "capturable"):
            if group[option]:
                return f"it was made with {option}=True"
        if any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"])):
            return "its rates are tensors"
    return ""


def planned_as(optimizer: Optimizer, state: str) -> Optimizer:
    """What the optimizer would be, without state: for planning. The optimizer itself is not changed."""
    twin: Optimizer = object.__new__(STATES[state][0])
    groups = [{**group, **_keys(state)} for group in optimizer.param_groups]
    vars(twin).update({key: value for key, value in vars(optimizer).items() if key != "step"})
    vars(twin).update(state=type(optimizer.state)(dict), param_groups=groups)
    return twin


@torch.no_grad()
def turn(optimizer: Optimizer, state: str) -> None:
    """Make it so, in place: what it has of moments is encoded one by one."""
    for group in optimizer.param_groups:
        group.update(_keys(state))
        for p in group["params"]:
            for key in (moments.FIRST, moments.SECOND):
                if (value := optimizer.state.get(p, {}).get(key)) is not None:
                    optimizer.state[p][key] = moments.encoded(key, value, p, group)
    optimizer.defaults.update(_keys(state))
    vars(optimizer).pop("_step_supports_amp_scaling", None)  # what fused steps promise GradScaler
    optimizer.__class__ = STATES[state][0]
    optimizer._patch_step_function()


def _keys(state: str) -> dict[str, Any]:
    return {"state": STATES[state][1], "least": moments.LEAST}
