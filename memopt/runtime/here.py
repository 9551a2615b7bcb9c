"""Which device a model lives on, as a `Device` with its real memory."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import nn

from memopt.devices import CATALOGUE, Device, device
from memopt.runtime.calibrate import calibrated


def device_of(model: nn.Module) -> Device:
    """The device that holds the model, as `one_device` and `here` have it."""
    return here(one_device(model))


def one_device(model: nn.Module) -> torch.device:
    """Where the model's parameters and buffers are. ValueError if they lie on several devices, or on meta."""
    found = dict.fromkeys(str(tensor.device) for tensor in (*model.parameters(), *model.buffers()))
    if len(found) > 1:
        raise ValueError(
            f"the model's tensors lie on {', '.join(found)}; memopt plans for one device: model.to(one of them) first"
        )
    where = torch.device(next(iter(found), "cpu"))
    if where.type == "meta":
        raise ValueError("the model's parameters are on 'meta'; load it, or name a device to plan for")
    return where


def here(where: torch.device) -> Device:
    """A present device: its catalogue entry with the memory torch reports and, once calibrated, the rates it reaches.

    ValueError if memopt has no entry for it.
    """
    if where.type == "cpu":
        return calibrated(device("cpu"), where)
    if where.type != "cuda":
        raise ValueError(f"device {where} is not supported; memopt runs on cpu and cuda")
    properties = torch.cuda.get_device_properties(where)
    return calibrated(replace(_entry(properties.name), memory=properties.total_memory), where)


def _entry(name: str) -> Device:
    """The catalogue entry a card's own name ("NVIDIA H200", "NVIDIA A100-SXM4-80GB") contains all words of."""
    words = set(re.split(r"[\s-]+", name.lower().replace("geforce", "").replace("rtx ", "rtx")))
    matches = [d for d in CATALOGUE.values() if d.kind == "cuda" and set(d.name.split("-")) <= words]
    if not matches:
        known = ", ".join(d.name for d in CATALOGUE.values() if d.kind == "cuda")
        raise ValueError(f"the card {name!r} is not in memopt's table ({known}); name the nearest with device=")
    return max(matches, key=lambda d: len(d.name))
